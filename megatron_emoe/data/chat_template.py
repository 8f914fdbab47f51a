"""A chat as the text and tokens that a model sees, and which of the tokens are the assistant's.

Templates are the tokenizer's own, or one of ours for base models, which have none. transformers renders them. Where a
template marks what the assistant says ({% generation %}), transformers' own mask is taken; else turns are found by
rendering: what stands before an answer, with the prompt for it, and what stands behind it must both be the beginning
of the whole, or the chat is refused.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_emoe.data.chat_records import OWN, Message

_LOOP = "{% if bos_token %}{{ bos_token }}{% endif %}{% for message in messages %}"
_ANSWER = "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"

TEMPLATES = {
    # As of the Tulu models and OLMoE-1B-7B-0924-Instruct: markers are plain text, the end of a turn is the tokenizer's.
    "tulu": _LOOP
    + "{{ '<|' + message['role'] + '|>\n' }}"
    + "{% if message['role'] == 'assistant' %}"
    + _ANSWER
    + "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    # As of Stanford Alpaca, without its preamble.
    "alpaca": _LOOP
    + "{% if message['role'] == 'assistant' %}{{ '### Response:\n' }}"
    + _ANSWER
    + "{{ '\n\n' }}{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    + "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    + "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    # ChatML: its end of a turn is a token of its own, which the tokenizer must have.
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}
"""Jinja by name. Each ends an answer with the token on which engines stop, and counts it as the assistant's."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def _is_jinja(text: str) -> bool:
    return "{{" in text or "{%" in text


@dataclass(frozen=True)
class RenderedChat:
    """ids: int64 [T]. is_answer: bool [T], True where the assistant says the token."""

    ids: np.ndarray
    is_answer: np.ndarray


def check_template(name: str) -> None:
    """ValueError unless --chat-template is `own`, a name of TEMPLATES, Jinja, or a file that can be read."""
    if name == OWN or name in TEMPLATES or _is_jinja(name):
        return
    known = f"must be {OWN}, {', '.join(TEMPLATES)}, or a file with a Jinja template"
    if not Path(name).is_file():
        raise ValueError(f"--chat-template {name}: no such file; {known}")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat-template {name}: cannot be read ({error})") from error
    if not text.strip():
        raise ValueError(f"--chat-template {name}: the file is empty")


def template_text(name: str, tokenizer: Any) -> str:
    """The Jinja that --chat-template means for a tokenizer of transformers.

    Raises:
        ValueError: the tokenizer has no template of its own, no end of sequence, or lacks the tokens of the named one.
    """
    if name == OWN:
        if not isinstance(tokenizer.chat_template, str):
            ours = ", ".join(TEMPLATES)
            raise ValueError(f"--chat-template {OWN}: the tokenizer has no template; {ours} are there for base models")
        return tokenizer.chat_template
    if name == "chatml" and len(tokenizer.encode("<|im_end|>", add_special_tokens=False)) != 1:
        raise ValueError("--chat-template chatml: the tokenizer has no token <|im_end|>; tulu needs none of its own")
    if name in TEMPLATES and name != "chatml" and tokenizer.eos_token is None:
        raise ValueError(f"--chat-template {name}: the tokenizer has no end of sequence, with which answers end")
    if _is_jinja(name):
        return name
    return TEMPLATES[name] if name in TEMPLATES else Path(name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class ChatTemplate:
    """Renders chats. tokenizer: a fast one of transformers. text: Jinja."""

    tokenizer: Any
    text: str

    @functools.cached_property
    def _marks(self) -> frozenset[str]:
        """Tokens that are no words of the vocabulary; some of them end turns."""
        return frozenset(self.tokenizer.get_added_vocab())

    @property
    def marks_answers(self) -> bool:
        """Whether the template itself says what the assistant's text is."""
        return _MARKS.search(self.text) is not None

    def render(self, messages: Sequence[Message], *, prompts: bool = False) -> str:
        """The text of these messages. prompts: with the beginning of an answer behind them.

        Raises:
            ValueError: the template refuses them, with its reason.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.text, tokenize=False, add_generation_prompt=prompts
            )
        except Exception as error:  # a template raises what it likes, Jinja its own
            raise ValueError(f"the chat template refuses it ({_one_line(error)})") from error

    def encode(self, messages: Sequence[Message]) -> RenderedChat:
        """Tokens of a chat, the same as transformers' apply_chat_template gives, and which are the assistant's.

        Raises:
            ValueError: the template refuses it, rewrites earlier turns, or leaves no token to the assistant.
        """
        chat = self._by_marks(messages) if self.marks_answers else self._by_prefixes(messages)
        if not chat.is_answer[1:].any():
            raise ValueError("the chat template leaves no token to the assistant")
        return chat

    def _by_marks(self, messages: Sequence[Message]) -> RenderedChat:
        try:
            found = self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.text, return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            raise ValueError(f"the chat template refuses it ({_one_line(error)})") from error
        return RenderedChat(np.asarray(found["input_ids"], np.int64), np.asarray(found["assistant_masks"], bool))

    def _by_prefixes(self, messages: Sequence[Message]) -> RenderedChat:
        whole = self.render(messages)
        spans = [self._span(messages, at, whole) for at, turn in enumerate(messages) if turn["role"] == "assistant"]
        found = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        is_answer = np.zeros(len(offsets), bool)
        for begin, end in spans:
            is_answer |= (offsets[:, 0] < end) & (offsets[:, 1] > begin)
        return RenderedChat(np.asarray(found["input_ids"], np.int64), is_answer)

    def _span(self, messages: Sequence[Message], at: int, whole: str) -> tuple[int, int]:
        """Where in the text the answer `at` begins and ends, with the token that ends it."""
        before = self.render(messages[:at], prompts=True) if at else ""
        behind = self.render(messages[: at + 1])
        if not whole.startswith(before) or not whole.startswith(behind):
            raise ValueError(
                f"the chat template rewrites what stands before turn {at + 1} once there is more: which tokens the "
                "assistant says cannot be told; give a template with {% generation %} marks (--chat-template FILE)"
            )
        return len(before), len(self._without_last_break(behind, len(before)))

    def _without_last_break(self, text: str, begin: int) -> str:
        """Without the white space behind a special token that ends a turn: no engine generates it."""
        shorter = text.rstrip()
        ends = any(shorter.endswith(token) for token in self._marks)
        return shorter if ends and len(shorter) > begin else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def runs(is_answer: np.ndarray) -> list[tuple[int, int, bool]]:
    """Stretches of equal values: (begin, end, value) in order. is_answer: bool [T], T above 0."""
    changes = np.flatnonzero(np.diff(is_answer)) + 1
    places = [0, *changes.tolist(), len(is_answer)]
    return [(begin, end, bool(is_answer[begin])) for begin, end in pairwise(places)]
