"""Print the table of elastic flags for the README, or put it there: python tools/flag_table.py [--write README.md]."""

import dataclasses
import re
import typing

from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.elastic_config import ElasticConfig, flag
from megatron_emoe.settings.field_flags import field_texts
from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.refusal import fail

BEGIN, END = "<!-- flags: tools/flag_table.py --write README.md -->", "<!-- end of flags -->"


def table() -> str:
    """One row per field of ElasticConfig: flag, values, default, and the field's own documentation."""
    texts = field_texts(ElasticConfig)
    rows = ["| flag | values | default | meaning |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(ElasticConfig):
        default = "off" if field.default is False else "unset" if field.default is None else f"`{field.default}`"
        meaning = texts[field.name].replace("|", r"\|")  # a bare one would end the cell
        rows.append(f"| `{flag(field.name)}` | {values(field.type)} | {default} | {meaning} |")
    return "\n".join(rows)


def values(kind: typing.Any) -> str:
    """What a flag takes, from its field's type."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if kind is bool:
        return "switch"
    arguments = [each for each in typing.get_args(kind) if each is not type(None)]
    if typing.get_origin(kind) is list:
        return f"{arguments[0].__name__} ..."
    return values(arguments[0]) if arguments else kind.__name__


def written(text: str, new: str) -> str:
    """`text` with the table between the two markers replaced. ValueError where the markers are missing."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"no place for the table: it stands between {BEGIN} and {END}")
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{new}\n{END}", text, flags=re.DOTALL)


def main() -> None:
    options = command_line(__doc__)
    options.add_argument("--write", type=a_path, help="Markdown file whose table to replace.")
    path = options.parse_args().write
    if path is None:
        print(table())
        return
    try:
        write_atomically(path, written(path.read_text(encoding="utf-8"), table()))
    except (OSError, ValueError) as error:
        fail(f"--write {path}: {error}")


if __name__ == "__main__":
    main()
