"""Flag files: the word @FILE on a command line stands for the words in that file.

A file is read like a shell reads words: white space separates, quotes hold together, a # that begins a word begins a
comment, a backslash at the end of a line continues it. A file may name another with @OTHER, relative to its own
folder. A path in a file that begins with ./ or ../ is relative to its folder, too: one that holds both can be moved. On
the command line, and without the dot, a path is relative to the working folder. Where a flag comes twice the later one
wins, so what follows @FILE on the command line overrides it. A value that begins with @ is written --flag=@value.
"""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_GAP = re.compile(r"(?:\s|\\\n|(?<![^\s])#[^\n]*)*", re.ASCII)  # to a shell no other blank separates
_BESIDE = re.compile(r"(--[\w-]+=)?(\.\.?/.*)", re.DOTALL)
_WORD = re.compile(r"""(?:[^\s"'\\]|\\[^\n]|"(?:[^"\\]|\\.)*"|'[^']*')+""", re.DOTALL | re.ASCII)


def expand(argv: list[str]) -> list[str]:
    """Return argv with every word @FILE replaced by the words of FILE.

    Raises:
        ValueError: a file that cannot be read, has an unbalanced quote, or names itself, with its path and line.
    """
    return [word for given in argv for word in _expand(given, Path(), ())]


def own_command() -> str:
    """The command that started this process, as a shell takes it, flag files by name; the interpreter without its
    folder. Under torchrun the whole line, with its numbers of machines and of processes on one."""
    interpreter, *words = sys.orig_argv
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return shlex.join([Path(interpreter).name, *words])
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    launcher = ["torchrun", *(["--nnodes", machines] if machines != "1" else [])]
    launcher += ["--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
    return shlex.join([*launcher, *(word for word in words if word != "-u")])


def flag_words(flags: Mapping[str, Any]) -> list[str]:
    """As words of a command line."""
    words = []
    for name, value in flags.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def flag_file(*parts: Mapping[str, Any]) -> str:
    """Text of a flag file: one flag a line, an empty line between parts."""
    return "\n".join(
        "".join(shlex.join(flag_words({name: value})) + "\n" for name, value in part.items()) for part in parts
    )


def _expand(word: str, folder: Path, open_files: tuple[Path, ...]) -> Iterator[str]:
    """The words that `word` stands for. folder: what a relative path is relative to; open_files: who names whom."""
    if not word.startswith("@"):
        yield _from_folder(word, folder) if open_files else word
        return
    if "\0" in word:
        raise ValueError(f"{word!r}: no file's name has a null character")
    file = folder / word[1:]
    real = Path(os.path.realpath(file))  # where resolve() raises for a name that no file can have
    if real in open_files:
        chain = " -> ".join(map(str, [*open_files, real]))
        raise ValueError(f"{word}: a flag file must not name itself ({chain})")
    for inner in _words(word, file):
        yield from _expand(inner, file.parent, (*open_files, real))


def _from_folder(word: str, folder: Path) -> str:
    """A word of a file in `folder`: a path that is relative to it becomes absolute, whoever reads it from wherever."""
    found = _BESIDE.fullmatch(word)
    return word if found is None else (found[1] or "") + os.path.abspath(folder / found[2])


def _words(word: str, file: Path) -> Iterator[str]:
    """The words in `file`, which the command line or another file calls `word`."""
    text = _read(word, file)
    end = _after_gap(text, 0)
    while end < len(text):
        found = _WORD.match(text, end)
        if found is None or (found.end() < len(text) and text[found.end()] in "\"'"):
            line = text.count("\n", 0, end) + 1
            raise ValueError(f"{word}: line {line} of {file} has a quote or a backslash without its partner")
        yield shlex.split(found[0])[0]
        end = _after_gap(text, found.end())


def _after_gap(text: str, start: int) -> int:
    gap = _GAP.match(text, start)
    assert gap is not None  # it matches the empty string
    return gap.end()


def _read(word: str, file: Path) -> str:
    if os.path.isdir(file):
        raise ValueError(f"{word}: {file} is a folder, not a flag file")
    try:
        return file.read_text(encoding="utf-8-sig")  # as some editors begin a text
    except FileNotFoundError:
        raise ValueError(f"{word}: no flag file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{word}: {file} cannot be read as text ({reason})") from error
