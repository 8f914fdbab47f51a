"""Every program, called with every bad value that its flags and files may have (tests/house/test_wall.py).

Flags come from the program's own parser, so a new one is tested by being there. Programs run in one process, up to the
place where work would start: a process group, a child process, or their end.
"""

import argparse
import contextlib
import io
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from tests import hf_models, sweep_results, sweeps, task_files, tiny
from tests.distributed import REPO

HUGE = "100000000000000000000"
WORDS = {  # what every value of that kind is: never right
    int: ["word", "1.5", "nan", ""],
    float: ["word", "nan", "inf", "1e400", ""],
}
NUMBERS = {int: ["-1", "0", HUGE], float: ["-1", "0"]}
"""Right for some flags: test_wall.py says for which."""
PATHS = ["", "missing/at/all", "empty", "folder", "file.txt/below", "dangling", "x" * 300]


class Case(NamedTuple):
    """A command line with one thing wrong in it. told: one of these the message must name."""

    name: str
    words: list[str]
    told: tuple[str, ...]
    prepare: Callable[[], Any] | None = None


class Ended(NamedTuple):
    """How it went. status: None where work would have started. new: files that were not there before."""

    name: str
    status: Any
    err: str
    seconds: float
    new: list[str]
    told: tuple[str, ...]


class WorkStarts(BaseException):
    """The program found nothing wrong."""


@dataclass
class Program:
    """A program and a command line of it that is right. skip: flags that only switch."""

    path: str
    words: list[str]
    verb: str | None = None
    paths: tuple[str, ...] = ()
    reads: dict[str, str] = field(default_factory=dict)
    """Files that it reads, by the kind that MANGLED knows."""
    use: str | None = None
    """What tells this command line from another of the same program."""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (Path(self.path).name, self.verb, self.use)))


class _Parser(Exception):
    """Carries a parser out of the program that made it."""


def parser_of(program: Program) -> argparse.ArgumentParser:
    """The parser that answers the program's --help."""

    def caught(self: Any, parser: argparse.ArgumentParser, *_: Any) -> None:
        raise _Parser(parser)

    with mock.patch.object(argparse._HelpAction, "__call__", caught):
        try:
            _run(program.path, [*([program.verb] if program.verb else []), *_kind(program), "--help"])
        except _Parser as found:
            return found.args[0]
    raise AssertionError(f"{program.name} --help made no parser")


def _kind(program: Program) -> list[str]:
    """eval_tasks.py has another parser for each kind of model."""
    at = program.words.index("--model") if program.path.endswith("eval_tasks.py") else len(program.words)
    return program.words[at : at + 2]


def _run(path: str, words: Sequence[str]) -> None:
    with mock.patch.object(sys, "argv", [Path(path).name, *words]), mock.patch.object(sys, "path", list(sys.path)):
        sys.path.insert(0, str((REPO / path).parent))
        runpy.run_path(str(REPO / path), run_name="__main__")


def flag_cases(program: Program) -> Iterator[Case]:
    """One for every bad value of every flag of the program, and its mistyped name."""
    for action in parser_of(program)._actions:
        name = action.option_strings[-1] if action.option_strings else None
        if action.help == argparse.SUPPRESS or name in (None, "--help", "--version", "--help-all"):
            continue
        yield Case(f"{name}x", [*program.words, f"{name}x"], (f"{name}x",))
        if action.nargs == 0:
            yield Case(f"{name}=word", [*program.words, f"{name}=word"], (name,))
            continue
        yield Case(f"{name} alone", [*_without(program.words, name), name], (name,))
        for value in values_of(action, name in program.paths):
            words = [*_without(program.words, name), name, *([value, value] if action.nargs == 2 else [value])]
            yield Case(f"{name} {value[:12]}", words, (name, value) if value else (name,))


def values_of(action: argparse.Action, is_path: bool) -> list[str]:
    """Bad values for one flag, by its type."""
    if action.choices is not None:
        return ["unknown", ""]
    kind = {"whole": int, "positive": float}.get(getattr(action.type, "__name__", ""), action.type)
    if kind in WORDS:
        return WORDS[kind] + NUMBERS[kind]  # type: ignore[index]
    return PATHS if is_path or kind is Path else []


def _without(words: Sequence[str], name: str) -> list[str]:
    """The command line without a flag and its values."""
    kept, dropping = [], False
    for word in words:
        if word.startswith("--"):
            dropping = word == name
        if not dropping:
            kept.append(word)
    return kept


def file_cases(program: Program) -> Iterator[Case]:
    """One for every file that the program reads and every way in which a file of its kind can be wrong."""
    for path, kind in program.reads.items():
        whole = Path(path).read_bytes()
        for how, mangle in MANGLED[kind].items():
            prepare = partial(_spoil, Path(path), mangle(whole))
            yield Case(f"{path} {how}", program.words, _told(path, how), prepare)
        for how in ("a folder", "dangling", "missing"):
            yield Case(f"{path} {how}", program.words, _told(path, how), partial(_replace, Path(path), how))


def _told(path: str, how: str) -> tuple[str, ...]:
    """The file, the folder that the command line names, or what a flag file stands for."""
    folder = Path(path).parts[:-1]
    return (Path(path).name, *folder[:1], *TOLD.get(how, ()))


def _spoil(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _replace(path: Path, how: str) -> None:
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "dangling":
        path.symlink_to("nowhere")


def _json_with(change: Callable[[Any], Any]) -> Callable[[bytes], bytes]:
    return lambda whole: json.dumps(change(json.loads(whole))).encode()


def _first_numbers(found: Any, to: Any) -> Any:
    """The same with every number replaced."""
    if isinstance(found, dict):
        return {name: _first_numbers(value, to) for name, value in found.items()}
    if isinstance(found, list):
        return [_first_numbers(value, to) for value in found]
    return to if isinstance(found, int | float) and not isinstance(found, bool) else found


BOM = b"\xef\xbb\xbf"
ANY: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "noise": lambda whole: bytes(range(256)) * 8,
}
JSON = ANY | {
    "cut": lambda whole: whole[: len(whole) // 2],
    "a list": lambda whole: b"[]",
    "a number": lambda whole: b"7",
    "a word": lambda whole: b'"word"',
    "null": lambda whole: b"null",
    "nested": lambda whole: b"[" * 200_000,
    "an object": lambda whole: b"{}",
    "numbers are words": _json_with(partial(_first_numbers, to="word")),
    "numbers are none": _json_with(partial(_first_numbers, to=float("nan"))),
    "numbers are negative": _json_with(partial(_first_numbers, to=-1)),
    "a key is new": _json_with(lambda found: found | {"no such key": 1}),
    "crlf": lambda whole: whole.replace(b"\n", b"\r\n"),
    "bom": lambda whole: BOM + whole,
}
BINARY = ANY | {"cut": lambda whole: whole[: len(whole) // 2], "longer": lambda whole: whole + b"\0" * 8}
FLAGS = ANY | {
    "a word": lambda whole: b"word\n",
    "an unknown flag": lambda whole: whole + b"\n--no-such-flag-at-all 1\n",
    "crlf": lambda whole: whole.replace(b"\n", b"\r\n"),
    "bom": lambda whole: BOM + whole,
    "an open quote": lambda whole: whole + b'\n--title "\n',
    "nested": lambda whole: b"[" * 200_000,
}
TOLD = {"a word": ("word",), "an unknown flag": ("--no-such-flag-at-all",), "nested": ("[[[[",)}
"""What a message about a flag file may name in place of the file: it stands for its words."""
PICKLE = {how: mangle for how, mangle in BINARY.items() if how != "longer"}  # which ends where it says that it ends
MANGLED = {"json": JSON, "binary": BINARY, "pickle": PICKLE, "flags": FLAGS, "any": ANY}


def end_of(program: Program, case: Case) -> Ended:
    """Run one case in the current folder, whose files are as before afterwards."""
    before = _listing()
    kept = {path: Path(path).read_bytes() for path in program.reads} if case.prepare else {}
    if case.prepare:
        case.prepare()
    out, err, start = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stopped_at_work():
        status = _status(program.path, case.words)
    seconds = time.process_time() - start
    sweeps._forget()
    _restore(kept)
    new = sorted(_listing() - before)
    for path in new:
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    return Ended(case.name, status, err.getvalue(), seconds, new, case.told)


def _listing() -> set[str]:
    return {str(path) for path in Path().rglob("*")}


def _restore(kept: dict[str, bytes]) -> None:
    for path, content in kept.items():
        if Path(path).is_dir():
            shutil.rmtree(path)
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content)


def _status(path: str, words: Sequence[str]) -> Any:
    signal.signal(signal.SIGALRM, lambda number, frame: (_ for _ in ()).throw(TimeoutError("no answer in a minute")))
    signal.alarm(60)
    try:
        _run(path, words)
    except SystemExit as leaving:
        return leaving.code or 0
    except WorkStarts:
        return None
    except BaseException:
        traceback.print_exc()
        return "an exception"
    finally:
        signal.alarm(0)
    return 0


@contextlib.contextmanager
def _stopped_at_work() -> Iterator[None]:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise WorkStarts

    with (
        mock.patch("torch.distributed.init_process_group", stop),
        mock.patch("urllib.request.urlopen", stop),  # the first question to a server
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),  # read from the environment when it was imported
        mock.patch("multiprocessing.context.ForkProcess.start", stop),
        mock.patch("multiprocessing.context.SpawnProcess.start", stop),
    ):
        yield


def ends_of(name: str, folder: Path) -> list[Ended]:
    """All cases of one program, in a copy of `folder`, which `prepare` has filled; to be called on a rank."""
    import torch

    torch.distributed.destroy_process_group()
    os.environ |= {"HF_DATASETS_OFFLINE": "1", "XDG_CACHE_HOME": str(folder.parent / "cache")}
    with tempfile.TemporaryDirectory() as copy:
        os.chdir(shutil.copytree(folder, Path(copy) / "folder", symlinks=True))
        return _ends_of(name)


def _ends_of(name: str) -> list[Ended]:
    (program,) = [program for program in programs() if program.name == name]
    right = end_of(program, Case("nothing wrong", program.words, ()))
    assert right.status in (0, None), (program.words, right.err)
    return [end_of(program, case) for case in (*flag_cases(program), *file_cases(program))]


def prepare(folder: Path) -> None:
    """What the command lines of `programs` name; to be called on a rank."""
    import torch

    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.sweep import curve, served

    torch.distributed.destroy_process_group()
    os.chdir(folder)
    hf_models.save("olmoe", Path("hf"), tokenizer=True)
    import_model(Path("hf"), Path("ckpt"), report=lambda _: None)
    sweeps.write_tokens(Path("tokens"))
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"w4 w{n} w7"}) + "\n" for n in range(5, 90)))
    turns = [{"role": role, "content": f"w4 w{n}"} for n, role in enumerate(("user", "assistant"))]
    Path("chats.jsonl").write_text(5 * (json.dumps({"messages": turns}) + "\n"))
    Path("recipe.args").write_text("--emoe-selection prefix --emoe-k-schedule default-or-larger\n")
    task_files.write(Path("tasks").resolve())
    for name, loss in (("sweep", 3.0), ("other", 3.1)):
        cells = {1: loss + 0.2, 2: loss + 0.1, 4: loss, 8: loss + 0.05}
        curve.save(sweep_results.make_result(name, cells), Path(f"{name}.json"))
    served.save(sweep_results.make_served(), Path("served.json"))
    Path("empty").touch()
    Path("file.txt").write_text("some words\n")
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")


def programs() -> list[Program]:
    """Every program with a command line that is right in the folder that `prepare` fills."""
    tokens = {"tokens.idx": "binary"}
    hf = {"hf/config.json": "json", "hf/model.safetensors": "binary"}
    megatron = {"ckpt/latest_checkpointed_iteration.txt": "any", "ckpt/release/.metadata": "pickle"}
    sweep = {"sweep.json": "json"}
    preprocess = "--input text.jsonl --output-prefix data --tokenizer-type HuggingFaceTokenizer --tokenizer-model hf"
    chats = f"--chat --chat-template tulu --seq-length 64 {preprocess}".replace("text.jsonl", "chats.jsonl")
    evaluated = ["--load", "ckpt", *sweeps.flags(Path("tokens"), Path("out.json"))]
    tasks = ["--k", "2", "--tasks", "tiny_choice", "--include-path", "tasks", "--out", "out.json"]
    training = tiny.flags(mock_data=None, data_path="tokens", save="save", load="save", save_interval=2, vocab_size=128)
    convert, k = "tools/convert_checkpoint.py", ["--k", "2", "4"]
    own_python = ["--serve-python", sys.executable]
    return [
        Program("pretrain_emoe.py", [*training, "@recipe.args"], reads=tokens | {"recipe.args": "flags"}),
        Program(convert, ["import", "--hf", "hf", "--out", "new"], "import", reads=hf),
        Program(convert, ["export", "--megatron", "ckpt", "--out", "new"], "export", reads=megatron),
        Program(convert, ["verify", "--hf", "hf", "--megatron", "ckpt", *k], "verify", reads=hf | megatron),
        Program(convert, ["inspect", "hf"], "inspect", reads=hf),
        Program(convert, ["grow", "--hf", "hf", "--out", "new", "--experts", "2x"], "grow", reads=hf),
        Program("tools/sweep_k.py", [*evaluated, *k], paths=("--hf", "--out"), reads=tokens | megatron),
        Program("tools/fit_tail_scale.py", [*_without(evaluated, "--out"), "--k", "4"], paths=("--out",), reads=tokens),
        Program("tools/eval_tasks.py", ["--model", "megatron", "--load", "ckpt", *tasks], reads=megatron),
        Program("tools/pick_k.py", ["sweep.json", "--max-flops", "2"], reads=sweep),
        Program(
            "tools/pick_k.py", ["sweep.json", "--budgets", "b.json"], None, ("--budgets",), sweep, "with --budgets"
        ),
        Program(
            "tools/serve_bench.py",
            ["--data-path", "tokens", "--rates", "1", "--out", "o.json", "--losses", "sweep.json", *own_python],
            paths=("--data-path", "--out", "--losses", "--serve-python"),
            reads=tokens | sweep,
        ),
        Program("tools/plot_sweep.py", ["sweep.json", "--out", "curve.png"], reads=sweep),
        Program(
            "tools/report.py",
            ["sweep.json", "--baseline", "other.json", "--served", "served.json", "--out", "card.html"],
            reads=sweep | {"served.json": "json"},
        ),
        Program("tools/join_sweeps.py", ["sweep.json", "--out", "joined.json"], paths=("--out",), reads=sweep),
        Program(
            "tools/plan_job.py",
            ["--model", "olmoe-7b", "--gpus", "8", "--recipe", "recipe.args"],
            paths=("--recipe",),
            reads={"recipe.args": "flags"},
        ),
        Program(
            "tools/preprocess_data.py",
            preprocess.split(),
            paths=("--input", "--output-prefix", "--tokenizer-model"),
            reads={"text.jsonl": "any", "hf/tokenizer.json": "json"},
        ),
        Program(
            "tools/preprocess_data.py",
            chats.split(),
            "--chat",
            paths=("--input", "--output-prefix", "--tokenizer-model", "--chat-template"),
            reads={"chats.jsonl": "any", "hf/tokenizer.json": "json"},
        ),
    ]
