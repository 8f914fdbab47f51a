"""Every program answers --help, --version and plain mistakes at once: without torch or Megatron, in little time.

Each runs in a process of its own in which an import of what is slow ends it. Time is that of the processor.
"""

import importlib.metadata
import os
import subprocess
import sys
from functools import cache
from typing import NamedTuple

import pytest

from tests import programs
from tests.distributed import REPO

pytestmark = pytest.mark.slow

BEFORE_THE_PACKAGE = {"uv_settings.py"}
"""A part of setup_env.sh, which runs before anything is installed: it has no command line."""

PATHS = [REPO / "pretrain_emoe.py", *sorted((REPO / "tools").glob("*.py"))]
PROGRAMS = {path.name: path for path in PATHS if path.name not in BEFORE_THE_PACKAGE}
SECONDS = 1.5
SLOW = ("torch", "megatron", "transformers", "matplotlib", "scipy")

START = f"""
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {SLOW}:
            raise RuntimeError("imported: " + name)
sys.meta_path.insert(0, Refuse())
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Ended(NamedTuple):
    """How a program ended, what it wrote, and the processor's seconds, its own and the system's."""

    status: int
    out: str
    err: str
    seconds: float


def call(program: str, *words: str, **environment: str) -> Ended:
    """Run it with these words; a second time where the first took long, as on a busy machine."""
    ended = _call(program, *words, **environment)
    return ended if ended.seconds < SECONDS else _call(program, *words, **environment)


def _call(program: str, *words: str, **environment: str) -> Ended:
    command = [sys.executable, "-c", START, str(PROGRAMS[program]), *words]
    env = os.environ | {"PYTHONPATH": str(REPO)} | environment
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()  # neither is longer than a pipe holds
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return Ended(process.returncode, out, err, usage.ru_utime + usage.ru_stime)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_fast_and_has_the_program_s_text(program):
    ended = call(program, "--help")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"usage: {program} ")
    first_line = PROGRAMS[program].read_text().split('"""')[1].splitlines()[0]
    assert " ".join(first_line.split()) in " ".join(ended.out.split())
    assert ended.seconds < SECONDS


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_is_fast_and_that_of_what_is_installed(program):
    ended = call(program, "--version")
    names = {"megatron_emoe": "megatron-emoe", "megatron-core": "megatron-core", "torch": "torch"}
    versions = ", ".join(f"{name} {importlib.metadata.version(package)}" for name, package in names.items())
    assert ended[:3] == (0, f"{program} ({versions})\n", "")
    assert ended.seconds < SECONDS


SWEEP = ["--k", "2", "--out", "a.json"]
JOB = ["--nodes", "1", "--processes", "1", "--save", "x"]
CHAT = ["--chat", "--output-prefix", "a", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "b"]
REFUSED = {
    "pretrain_emoe.py": [
        (["--emoe-pol-k", "6"], "--emoe-pol-k: no such flag; did you mean --emoe-pool-k?"),
        (["--emoe_pool_k=6"], "--emoe_pool_k: no such flag; did you mean --emoe-pool-k?"),
        (["--emoe-pool-k", "six"], "--emoe-pool-k six: must be a whole number"),
        (["--emoe-distill-coeff", "much"], "--emoe-distill-coeff much: must be a number"),
        (["--emoe-selection", "best"], "--emoe-selection best: must be one of 'topk', 'coactivation', 'prefix'"),
        (["--emoe-pool-k"], "--emoe-pool-k: expected one argument"),
        (["--emoe-tail-scale", "4:x"], "--emoe-tail-scale 4:x: must be a finite number of at least 0"),
        (["@nowhere.args"], "@nowhere.args: no flag file nowhere.args"),
        (["--load", "/nowhere"], "--load /nowhere: no such folder"),
        (["--load", "/nowhere", "--save", "/nowhere", "--finetune"], "--load /nowhere: no such folder"),
        (["--host-mode", "--use-flash-attn"], "--use-flash-attn: not possible in host mode"),
        (
            ["--num-experts", "8", "--moe-router-topk", "2", "--emoe-selection", "coactivation", "--emoe-pool-k", "9"],
            "--emoe-pool-k 9: must not exceed --num-experts 8",
        ),
        (
            ["--num-experts", "8", "--moe-router-topk", "2", "--emoe-null-experts", "2"],
            "--emoe-null-experts 2: needs --emoe-selection null-experts",
        ),
    ],
    "sweep_k.py": [
        ([], "the following arguments are required: --out"),
        (["--k", "two", "--out", "a.json"], "--k two: must be a whole number"),
        (["--k-per-layer", "2,x", "--out", "a.json"], "--k-per-layer '2,x': must be whole numbers with commas"),
        (SWEEP, "--load is not given: which checkpoint?"),
        ([*SWEEP, "--load", "/nowhere"], "--load /nowhere: no such folder"),
        ([*SWEEP, "--hf", "/nowhere"], "/nowhere/config.json: no such file; /nowhere is no Hugging Face model"),
        ([*SWEEP, "--hf", "a", "--load", "b"], "--hf a excludes --load b: one model at a time"),
        (["--load", "/", "--out", "a.json"], "--k is not given, nor --k-per-layer: which numbers of active experts?"),
        (["--load", "/", "--k", "2", "--out", "/nowhere/a"], "--out /nowhere/a: the folder /nowhere does not exist"),
        ([*SWEEP, "--load", "/", "--emoe-evalk", "4"], "--emoe-evalk: no such flag; did you mean --emoe-eval-k?"),
        ([*SWEEP, "--load", "/", "--coverage-at-least", "0"], "--coverage-at-least 0: must be at least 1"),
    ],
    "fit_tail_scale.py": [
        (["--load", "/"], "the following arguments are required: --k"),
        (["--k", "4"], "--load is not given: which checkpoint?"),
        (["--k", "4", "--load", "/", "--max-scale", "0"], "--max-scale 0.0: must be above 0 and finite"),
        (["--k", "4", "--load", "/", "--out", "/nowhere/a"], "--out /nowhere/a: the folder /nowhere does not exist"),
    ],
    "eval_tasks.py": [
        (["--model", "both", *SWEEP, "--load", "/"], "--model both: must be one of 'hf', 'megatron'"),
        (["--model"], "--model: expected one argument"),
        (["--model", "hf", *SWEEP, "--load", "/nowhere"], "/nowhere/config.json: no such file; /nowhere is no Hugging"),
        (["--model", "hf", *SWEEP, "--load", "/", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--model", "megatron", *SWEEP, "--load", "/nowhere"], "--load /nowhere: no such folder"),
        (["--model", "megatron", *SWEEP, "--emoe-evalk", "4"], "--emoe-evalk: no such flag; did you mean"),
        (["--model", "megatron", *SWEEP, "--load", "/", "--include-path", "/no"], "--include-path /no: no such folder"),
    ],
    "check_job.py": [
        (["--nodes", "0"], "--nodes 0: must be a whole number of at least 1"),
        ([*JOB, "--", "@nowhere.args"], "@nowhere.args: no flag file nowhere.args"),
        ([*JOB, "--", "--lr", "1"], "--save-interval is not given: a run that dies would start over"),
        (
            [*JOB, "--", "--save-interval", "9", "--exit-signal-handler", "--emoe-selecton", "topk"],
            "--emoe-selecton: no such flag; did you mean --emoe-selection?",
        ),
    ],
    "plan_job.py": [
        (["--model", "olmoe-7b"], "the following arguments are required: --gpus"),
        (["--model", "olmoe-7b", "--gpus", "none"], "--gpus none: must be a whole number of at least 1"),
        (["--model", "gpt-5", "--gpus", "8"], "--model gpt-5: neither a flag file nor one of olmoe-7b"),
        (["--model", "olmoe-7b", "--gpus", "8", "--recipe", "none.args"], "@none.args: no flag file none.args"),
        (["--model", "olmoe-7b", "--gpus", "8", "--mfu", "2"], "--mfu 2: must be at most 1"),
    ],
    "preprocess_data.py": [
        (["--input", "/"], "the following arguments are required: --output-prefix"),
        (["--input", "/nowhere", "--output-prefix", "a"], "--tokenizer-type is missing (or --train-tokenizer VOCAB)"),
        (["--input", "/nowhere", "--output-prefix", "a", "--train-tokenizer", "9"], "--input /nowhere: "),
        (["--input", "/", "--output-prefix", "a", "--workers", "0"], "--workers 0: must be a whole number of at least"),
        ([*CHAT, "--input", "/nowhere"], "--chat: needs --seq-length, that of the training"),
        ([*CHAT, "--input", "/nowhere", "--seq-length", "9"], "--input /nowhere: no such file or folder"),
        ([*CHAT, "--input", "/", "--seq-length", "9", "--chat-template", "a"], "--chat-template a: no such file; must"),
        ([*CHAT, "--input", __file__, "--seq-length", "9"], f"--input {__file__}: is plain text; chats are JSONL"),
    ],
    "convert_checkpoint.py": [
        ([], "the following arguments are required: VERB"),
        (["import", "--hf", "/nowhere", "--out", "a"], "/nowhere/config.json: no such file; /nowhere is no Hugging"),
        (["import", "--hf", "/", "--out", "a", "--workers", "0"], "--workers 0: must be a whole number of at least 1"),
        (["export", "--megatron", "/nowhere", "--out", "a"], "--megatron /nowhere: no such folder"),
        (["inspect", "/nowhere"], "/nowhere: no such folder"),
        (["grow", "--hf", "/", "--out", "a", "--experts", "1x"], "--experts 1x: must be 2x to 16x"),
        (["grow", "--hf", "/", "--out", "a", "--experts", "2x", "--noise", "nan"], "--noise nan: must be a number in"),
    ],
    "pick_k.py": [
        (["/nowhere.json", "--max-flops", "1"], "/nowhere.json: cannot be read"),
        (["a", "--max-flops", "x"], "--max-flops x: must be a number"),
        (["a", "--budgets", "/nowhere/b"], "--budgets /nowhere/b: the folder /nowhere does not exist"),
        (["a", "--budgets", "b", "--max-flops", "1"], "--max-flops 1: not with --budgets, which lists every budget"),
    ],
    "serve_bench.py": [
        (["--rates", "1", "--out", "a.json"], "the following arguments are required: --data-path"),
        (["--rates", "0", "--out", "a.json", "--data-path", "a"], "--rates 0: must be a number above 0"),
        (["--rates", "1", "--out", "a", "--data-path", "a"], "--out a: must end in .json"),
        (["--rates", "1", "--out", "a.json", "--data-path", "/no"], "--data-path /no.bin does not exist"),
        (["--rates", "1", "--out", "a.json", "--data-path", "a", "--seed", "-1"], "--seed -1: must be in [0, 4294967"),
    ],
    "plot_sweep.py": [
        (["/nowhere.json", "--out", "a.png"], "/nowhere.json: cannot be read"),
        (["a", "--out", "a.gif"], "--out: a.gif; must end in one of .png, .svg, .pdf"),
        (["a", "--out", "a.png", "--x", "time"], "--x time: must be one of 'k', 'active_params'"),
    ],
    "report.py": [(["/nowhere.json", "--out", "a.html"], "/nowhere.json: cannot be read")],
    "join_sweeps.py": [(["/nowhere.json", "--out", "a.json"], "/nowhere.json: cannot be read")],
    "flag_table.py": [(["--write", "/nowhere.md"], "--write /nowhere.md: ")],
    "flags_page.py": [(["--write", "/nowhere/a.md"], "--write /nowhere/a.md: the folder /nowhere does not exist")],
}


def test_every_program_has_a_refusal_here():
    assert REFUSED.keys() == PROGRAMS.keys()


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [(program, *case) for program, cases in REFUSED.items() for case in cases],
)
def test_what_is_plainly_wrong_is_refused_at_once(program, words, message):
    ended = call(program, *words)
    assert (ended.status, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    head, error, told = line.partition(": error: ")
    assert (head.split()[0], error) == (program, ": error: ") and told.startswith(message), line
    assert ended.seconds < SECONDS


def test_an_import_of_what_is_slow_would_be_seen(tmp_path, monkeypatch):
    slow = tmp_path / "slow.py"
    slow.write_text("import torch")
    monkeypatch.setitem(PROGRAMS, "slow.py", slow)
    ended = call("slow.py")
    assert ended.status == 1 and "RuntimeError: imported: torch" in ended.err


TAKES_MEGATRON_S_FLAGS = {
    "pretrain_emoe.py": [],
    "sweep_k.py": [],
    "fit_tail_scale.py": [],
    "eval_tasks.py": ["--model", "megatron"],
}


@cache
def help_of(program: str) -> str:
    return call(program, *TAKES_MEGATRON_S_FLAGS[program], "--help").out


@pytest.mark.parametrize("program", TAKES_MEGATRON_S_FLAGS)
def test_help_has_the_elastic_flags_and_says_how_to_list_the_others(program):
    text = help_of(program)
    assert "\nelastic MoE:\n" in text and "\nhost mode:\n" in text
    assert "\n  --emoe-selection {topk,coactivation," in text and "\n  --emoe-clip-qkv " in text
    assert "\n  --help-all " in text and "All of Megatron-Core's flags work as well" in text
    assert "--moe-router-topk MOE" not in text  # Megatron's own, read early for the rules alone


def test_each_tool_s_help_has_its_own_group():
    groups = {"sweep_k.py": "sweep", "fit_tail_scale.py": "tail scale", "eval_tasks.py": "tasks"}
    assert all(f"\n{group}:\n" in help_of(program) for program, group in groups.items())


@pytest.mark.parametrize("word", ["--help", "--version"])
@pytest.mark.parametrize("program", ["pretrain_emoe.py", "sweep_k.py", "eval_tasks.py"])
def test_of_many_ranks_one_speaks(program, word):
    assert call(program, word, RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")[:3] == (0, "", "")


def test_a_run_that_goes_on_where_it_saves_need_not_have_saved_yet(tmp_path):
    """What is refused then is for lack of Megatron: the import of it is what comes next."""
    folder = str(tmp_path / "none")
    ended = call("pretrain_emoe.py", "--load", folder, "--save", folder)
    assert "RuntimeError: imported: torch" in ended.err or "RuntimeError: imported: megatron" in ended.err


def test_help_all_has_megatron_s_flags_too():
    script = [programs.python(), str(REPO / "tools/sweep_k.py"), "--help-all"]
    text = subprocess.run(script, capture_output=True, text=True, check=True, env=os.environ).stdout
    for name in ("--tensor-model-parallel-size", "--emoe-selection", "--layer-sensitivity", "--host-mode"):
        assert f"\n  {name} " in text
