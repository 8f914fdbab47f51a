"""What both kinds of model refuse to score: a text without a token of its own, and an answer that is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from megatron_emoe.settings.refusal import NoNumber

_SHOWN = 40
"""Characters of a text that a message shows."""


class CheckedLM(TemplateLM):
    """Stands before one of lm-eval's models in the order of classes; that one splits texts into tokens and scores them.

    lm-eval's own models end with an AssertionError where a continuation has no token of its own.
    """

    asked: Sequence[Instance] = ()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As lm-eval's.

        Raises:
            ValueError: a continuation without a token of its own, or longer than the model sees.
            NoNumber: an answer that is none.
        """
        self.asked = requests
        for request in requests:
            context, continuation = request.args
            if context == "" and not self.tok_encode(continuation, add_special_tokens=False):
                raise ValueError(f"{place(request)}: context and continuation are empty: nothing to score")
        answers = super().loglikelihood(requests, disable_tqdm)
        check_numbers(requests, [logprob for logprob, _ in answers])
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """As lm-eval's. Raises `NoNumber` for an answer that is none."""
        answers = super().loglikelihood_rolling(requests, disable_tqdm)  # type: ignore[safe-super]
        check_numbers(requests, answers)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], *more: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for index, (texts, _, continuation) in enumerate(requests):
            if texts is not None:  # a window of a whole text has none
                self._check_continuation(index, texts, continuation)
        return super()._loglikelihood_tokens(requests, *more, **kwargs)  # type: ignore[safe-super]

    def _check_continuation(self, index: int, texts: tuple[str, str], continuation: list[int]) -> None:
        if continuation and len(continuation) <= self.max_length:
            return
        where = place(self.asked[index])
        if continuation:
            told = f"a continuation of {len(continuation)} tokens: the model sees {self.max_length} at most"
            raise ValueError(f"{where}: {told}, see --max-length")
        raise ValueError(
            f"{where}: the continuation {texts[1][:_SHOWN]!r} has no token of its own after {texts[0][-_SHOWN:]!r} "
            "with this tokenizer, which merges the two; let continuations begin with a space"
        )


def check_numbers(requests: Sequence[Instance], answers: Sequence[float]) -> None:
    """Raises `NoNumber` for the first log-probability that is not finite, and says whose it is."""
    for request, answer in zip(requests, answers, strict=True):
        if not math.isfinite(answer):
            raise NoNumber(f"{place(request)}: the log-probability is {answer}")


def place(request: Instance) -> str:
    """Which request of a task: its document, and which of that document's choices, both counted from 0."""
    return f"document {request.doc_id}, request {request.idx}"
