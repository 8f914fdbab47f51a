"""Chats as people keep them, and as one thing: a list of messages {"role", "content"}. Needs nothing but JSON.

A record is a line of JSONL, a row of Parquet, or an object of a JSON list. All records of a file are of one kind, that
of the first. Kinds are told by their keys alone, and keys that fit two kinds are refused: nothing is guessed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]

OWN = "own"
"""Of --chat-template: what the tokenizer has."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Names of roles, those of ShareGPT among them -> the three that chat templates know."""

TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""A column that holds a list of turns -> the keys of a turn: the messages of most tools, ShareGPT's conversations (also
those of Open-Orca/SlimOrca)."""

PAIRS = (
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # ise-uiuc/Magicoder-Evol-Instruct-110K
    ("problem", "solution"),  # ise-uiuc/Magicoder-OSS-Instruct-75K
    ("query", "response"),  # meta-math/MetaMathQA
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "response"),  # Open-Orca/OpenOrca
)
"""Columns of one question and one answer."""

SYSTEM = ("system", "system_prompt")
MORE = "input"
"""Columns beside a pair: what the system says, and what Alpaca puts behind its instruction."""


@dataclass(frozen=True)
class Schema:
    """Of what kind a file's records are. turns: the column of a list of turns; else question and answer are columns.
    others: columns beside them that are read where a record has them."""

    turns: str | None = None
    question: str = ""
    answer: str = ""
    others: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All that are read, those that a record may lack last."""
        needed = (self.turns,) if self.turns else (self.question, self.answer)
        return needed + self.others

    def __str__(self) -> str:
        return repr(self.turns) if self.turns else f"{self.question!r} and {self.answer!r}"


def schema_of(keys: Iterable[str], chosen: tuple[str, ...] = ()) -> Schema:
    """The kind of a record with these keys.

    Args:
        keys: of the first record, or columns of a Parquet file.
        chosen: what --json-keys says: one column of turns, or those of question and answer; () where it says nothing.

    Raises:
        ValueError: the keys fit no kind, or several.
    """
    there = list(keys)
    others = tuple(key for key in (*SYSTEM, MORE) if key in there)
    if chosen:
        missing = [key for key in chosen if key not in there]
        if missing:
            raise ValueError(f"no key {missing[0]!r}, there are {_named(there)} (--json-keys)")
        return Schema(turns=chosen[0]) if len(chosen) == 1 else Schema(None, chosen[0], chosen[1], others)
    found = [Schema(turns=key) for key in TURNS if key in there]
    found += [Schema(None, *pair, others) for pair in PAIRS if {*pair} <= {*there}]
    if len(found) == 1:
        return found[0]
    if not found:
        kinds = ", ".join([*TURNS, *(f"{a} and {b}" for a, b in PAIRS)])
        raise ValueError(f"no chat in the keys {_named(there)}: must have {kinds}, or name them with --json-keys")
    raise ValueError(f"has {found[0]} and also {found[1]}: say which with --json-keys")


def _named(keys: Iterable[str]) -> str:
    return ", ".join(map(repr, keys)) or "none"


def messages_of(record: Any, schema: Schema) -> list[Message]:
    """The turns of a record in order, roles as chat templates know them. A system message without text is left out.

    Raises:
        ValueError: a record of another kind, a turn that has no text or an unknown role, no assistant's turn.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a {type(record).__name__}, must be an object")
    for key in schema.columns[: 1 if schema.turns else 2]:
        if key not in record:
            raise ValueError(f"no key {key!r}, there are {_named(record)}; the file's first record has {schema}")
    messages = _turns(record, schema) if schema.turns else _pair(record, schema)
    if not messages:
        raise ValueError("has no turn")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no turn is the assistant's: there is nothing to learn")
    return messages


def _turns(record: Mapping[str, Any], schema: Schema) -> list[Message]:
    assert schema.turns is not None
    turns = record[schema.turns]
    if not isinstance(turns, list):
        raise ValueError(f"{schema.turns!r} is a {type(turns).__name__}, must be a list of turns")
    messages = [_turn(number, turn, schema.turns) for number, turn in enumerate(turns, 1)]
    return [message for message in messages if message is not None]


def _turn(number: int, turn: Any, column: str) -> Message | None:
    if not isinstance(turn, Mapping):
        raise ValueError(f"turn {number} is a {type(turn).__name__}, must be an object")
    pairs = [TURNS[column]] if column in TURNS else list(TURNS.values())
    role_key, text_key = next((pair for pair in pairs if set(pair) <= set(turn)), (None, None))
    if role_key is None or text_key is None:
        asked = " or ".join(f"{role!r} and {text!r}" for role, text in pairs)
        raise ValueError(f"turn {number} has the keys {_named(turn)}, must have {asked}")
    role = turn[role_key]
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"turn {number} has the role {role!r:.40}: must be one of {', '.join(ROLES)}")
    return _message(ROLES[role], turn[text_key], f"turn {number} ({role})")


def _pair(record: Mapping[str, Any], schema: Schema) -> list[Message]:
    system = next((record[key] for key in SYSTEM if key in schema.others and record.get(key)), "")
    more = record.get(MORE) if MORE in schema.others else ""
    question = record[schema.question]
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        question = f"{question}\n\n{more}"
    told = (
        _message("system", system, "the system's text"),
        _message("user", question, repr(schema.question)),
        _message("assistant", record[schema.answer], repr(schema.answer)),
    )
    return [message for message in told if message is not None]


def _message(role: str, text: Any, where: str) -> Message | None:
    if not isinstance(text, str):
        raise ValueError(f"{where} is a {type(text).__name__}, must be a text")
    if not text.strip():
        if role == "system":
            return None
        raise ValueError(f"{where} is empty")
    try:  # JSON can spell half a character, which no tokenizer takes
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate {error.object[error.start]!r}") from error
    return {"role": role, "content": text}


def record_of(line: bytes) -> Any:
    """What a line of JSON holds. ValueError: it is not UTF-8, or no JSON."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {line[error.start]:#04x} at place {error.start} of it is not UTF-8") from error
    except RecursionError:
        raise ValueError("not valid JSON: too many brackets in each other") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from error
