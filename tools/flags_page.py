"""Print docs/flags.md, what every option of Megatron's is here: python tools/flags_page.py [--write docs/flags.md].

The classes are declared in megatron_emoe/training/megatron_flags.py and megatron_notes.py; the options are those of the
installed Megatron-Core.
"""

from argparse import Action, ArgumentParser
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_emoe.host import flags as host_flags
from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.paths import check_out
from megatron_emoe.settings.refusal import fail
from megatron_emoe.training.megatron_flags import REFUSED_VALUES, why_refused
from megatron_emoe.training.megatron_notes import ELASTIC, ONLY_WITH, REFUSED_TOGETHER

CLASSES = {
    "as in Megatron": "it does what Megatron's help says (`pretrain_emoe.py --help-all`)",
    "elastic": "it works, and elastic training changes or adds to its meaning",
    "with": "it works only with what the note says; without that it has no effect, or is refused",
    "not with": "it works, but not together with what the note says: the run refuses it by both flags",
    "refused": "a run ends at once with the flag and the note, and exit status 2",
}
"""Class of an option -> what it means."""

BEGIN = """# Megatron's flags

Every option of Megatron-Core 0.19's own parser, in its groups. Those of this package are in README.md. This page is
written by `python tools/flags_page.py --write docs/flags.md`; a test compares it with the installed parser.

| here | |
| --- | --- |
"""

AFTER_CLASSES = """
A flag is refused only where it stands on a command line or in a flag file, never for its default or for what a
checkpoint stores. "Not in host mode" is about runs without a GPU. Nothing in these tables has run on a GPU yet.
"""


def page() -> str:
    """The whole page."""
    lines = [BEGIN.rstrip("\n"), *(f"| {name} | {text} |" for name, text in CLASSES.items()), AFTER_CLASSES]
    for title, options in megatron_options().items():
        lines += [f"## {title}", "", "| flag | here | note |", "| --- | --- | --- |"]
        lines += [_row(option) for option in options]
        lines.append("")
    return "\n".join(lines)


def megatron_options() -> dict[str, list[Action]]:
    """Title of a group of Megatron's own parser -> its options."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    add_megatron_arguments(parser)
    groups = {str(group.title): list(group._group_actions) for group in parser._action_groups}
    return {title: options for title, options in groups.items() if options}


def _row(option: Action) -> str:
    names = ", ".join(f"`{name}`" for name in option.option_strings)
    kind, note = described(option.option_strings)
    return f"| {names} | {kind} | {note} |"


def described(names: list[str]) -> tuple[str, str]:
    """Class and note of an option with these names."""
    reasons = [reason for name in names if (reason := why_refused(name))]
    if reasons:
        return "refused", reasons[0]
    needed = next((text for name in names if (text := _needed(name))), None)
    elastic, together = _noted(ELASTIC, names), _noted(REFUSED_TOGETHER, names)
    values = [f"{given.split()[1]}: {why}" for given, why in REFUSED_VALUES.items() if given.split()[0] in names]
    kinds = {"elastic": elastic, "not with": together or values, "with": needed}
    kind = next((kind for kind, found in kinds.items() if found), "as in Megatron")
    notes = [elastic, needed and f"with {needed}", together and f"refused: {together}"]
    notes += [f"refused: {value}" for value in values]
    return kind, "; ".join([note for note in notes if note] + _host_notes(names))


def _noted(notes: Mapping[str, str], names: list[str]) -> str | None:
    return next((notes[name] for name in names if name in notes), None)


def _needed(name: str) -> str | None:
    """What this flag has no effect without."""
    for needed, patterns in ONLY_WITH.items():
        is_needed = name in needed.replace(",", "").split()
        if not is_needed and any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return needed
    return None


def _host_notes(names: list[str]) -> list[str]:
    possible = [host_flags.POSSIBLE[name].replace(" ", " or ") for name in names if name in host_flags.POSSIBLE]
    notes = [f"in host mode {values}" for values in possible]
    notes += ["left out in host mode" for name in names if name in host_flags.LEFT_OUT]
    return notes + ["not in host mode" for words in host_flags.IMPOSSIBLE.values() if {*names} & {*words.split()}]


def main() -> None:
    options = command_line(__doc__)
    options.add_argument("--write", type=Path, help="File to write the page to.")
    path = options.parse_args().write
    if path is None:
        print(page())
        return
    try:
        check_out(path, "--write")
        write_atomically(path, page())
    except (OSError, ValueError) as error:
        fail(error if isinstance(error, ValueError) else f"--write {path}: {error}")


if __name__ == "__main__":
    main()
