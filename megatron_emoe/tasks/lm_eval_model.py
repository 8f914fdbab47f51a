"""A Megatron model for lm-eval (Language Model Evaluation Harness, EleutherAI): what the tasks ask for, in rows.

The scores follow lm-eval's own HFLM, so that a checkpoint and its export to transformers answer alike: the same prefix
for an empty context, contexts cut from the left, the same split between context and continuation. Generation runs the
whole row again for every token: no cache of keys and values, hence nothing that depends on what else is in a batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from megatron_emoe.settings.refusal import NoNumber
from megatron_emoe.tasks.checked import CheckedLM, place
from megatron_emoe.tasks.forward_server import NO_TOKEN, ForwardServer, Next, Score

_SAMPLING = {"do_sample", "temperature", "top_k", "top_p"}
_NO_EFFECT = {"use_cache", "pad_token_id", "eos_token_id", "num_return_sequences"}


class Text:
    """Between text and token ids, by Megatron's tokenizer (as get_tokenizer() gives it).

    Where that wraps one of transformers, the wrapped one answers: the same special tokens as HFLM adds.
    """

    def __init__(self, tokenizer: Any) -> None:
        inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
        self._hf = inner if isinstance(inner, PreTrainedTokenizerBase) else None
        self._own = tokenizer
        self.end: int = tokenizer.eod if self._hf is None else self._hf.eos_token_id
        start = None if self._hf is None else self._hf.bos_token_id
        self.prefix: int = self.end if start is None else start
        self.end_text: str = self.decode([self.end], keep_special=True)

    def encode(self, text: str, add_special: bool | None = None) -> list[int]:
        """Token ids. add_special: None as the tokenizer is set, but no second prefix where the text begins with it."""
        if self._hf is None:
            return [int(token) for token in self._own.tokenize(text)] if text else []
        if add_special is None and text.startswith(self._hf.decode(self.prefix)):
            add_special = False
        return self._hf.encode(text, **({} if add_special is None else {"add_special_tokens": add_special}))

    def decode(self, tokens: Sequence[int], keep_special: bool = False) -> str:
        """Text of token ids, special tokens left out unless kept."""
        if self._hf is not None:
            return self._hf.decode(list(tokens), skip_special_tokens=not keep_special)
        if not keep_special:
            tokens = [token for token in tokens if token != self.end]
        return self._own.detokenize(list(tokens))


@dataclass
class Generation:
    """One text in the making. stops: texts that end it. left: tokens it may still get."""

    context: list[int]
    stops: list[str]
    left: int
    sampling: dict[str, Any]
    random: random.Random
    tokens: list[int] = field(default_factory=list)

    def row(self) -> Next:
        """What to ask the model now."""
        draw = self.random.random() if self.sampling else None
        return Next((*self.context, *self.tokens), draw, **self.sampling)


class RowsLM(TemplateLM):
    """lm-eval's model interface on top of a ForwardServer, on rank 0.

    batch: rows in one forward pass on each data-parallel rank. max_length: tokens that the model may see. seed: of
    sampled generations; each request draws from a stream of its own, so the batch does not matter.
    """

    max_gen_toks = 256
    """Tokens to generate where a task does not say: HFLM's number."""

    def __init__(self, server: ForwardServer, text: Text, *, batch: int, max_length: int, seed: int = 1234) -> None:
        super().__init__()
        self.server, self.text, self.max_length, self.seed = server, text, max_length, seed
        self.rows_at_once = batch * server.shares

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text."""
        return self.text.end

    @property
    def prefix_token_id(self) -> int:
        """Token that an empty context is replaced by."""
        return self.text.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text."""
        return self.text.encode(string, add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): log-probability of the continuation (nats), whether it is greedy.

        Requests with the same input, such as the letters of a multiple choice, are one row.
        """
        inputs: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            inputs.setdefault(self._input(context, continuation), []).append(index)
        answers: list[Any] = [None] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as progress:
            longest_first = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
            for part in _batches(longest_first, self.rows_at_once):
                rows = [Score(tokens, [requests[i][2] for i in inputs[tokens]]) for tokens in part]
                for tokens, scores in zip(part, self.server.answer(rows), strict=True):
                    for index, scored in zip(inputs[tokens], scores, strict=True):
                        answers[index] = scored
                    progress.update(len(scores))
        return answers

    def _input(self, context: list[int], continuation: list[int]) -> tuple[int, ...]:
        """What the model sees: all but the last token, cut from the left to what it may see."""
        return tuple((context + continuation)[-(self.max_length + 1) : -1])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of whole texts, window by window, each token once."""
        pieces: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                pieces.append((None, *make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first stop text, end token or length limit; greedy, or sampled where a task says so.

        A text that is finished leaves its place in the batch to the next one.
        """
        texts = [self._begin(number, *request.args) for number, request in enumerate(requests)]
        waiting = iter(sorted(range(len(texts)), key=lambda i: -len(texts[i].context)))
        done = [""] * len(texts)
        running: list[int] = []
        with tqdm(total=len(texts), desc="generation", disable=disable_tqdm) as progress:
            while running := [*running, *islice(waiting, self.rows_at_once - len(running))]:
                chosen = self.server.answer([texts[i].row() for i in running])
                if NO_TOKEN in chosen:
                    where = place(requests[running[chosen.index(NO_TOKEN)]])
                    raise NoNumber(f"{where}: the logits of the next token are no numbers")
                finished = {i for i, token in zip(running, chosen, strict=True) if self._take(texts[i], token)}
                for i in finished:
                    done[i] = self._finish(texts[i])
                progress.update(len(finished))
                running = [i for i in running if i not in finished]
        return done

    def _begin(self, number: int, context: str, asked: dict[str, Any]) -> Generation:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        limit, until = kwargs.pop("max_gen_toks"), kwargs.pop("until")
        unknown = sorted(set(kwargs) - _SAMPLING - _NO_EFFECT)
        if unknown:
            raise ValueError(f"generation_kwargs {unknown[0]}: {kwargs[unknown[0]]!r} is not supported for Megatron")
        if limit < 1 or limit >= self.max_length:
            raise ValueError(f"{limit} tokens to generate: must lie in [1, {self.max_length - 1}], see --max-length")
        tokens = self.tok_encode(context)[-(self.max_length - limit) :] or [self.prefix_token_id]
        samples = kwargs["do_sample"] and kwargs.get("temperature", 0.0) > 0
        sampling = {key: kwargs[key] for key in ("temperature", "top_k", "top_p") if kwargs.get(key) is not None}
        stops = [stop for stop in (*until, self.text.end_text) if stop]
        return Generation(tokens, stops, limit, sampling if samples else {}, random.Random(f"{self.seed} {number}"))

    def _take(self, text: Generation, token: int) -> bool:
        """Add a token; whether the text is finished."""
        text.tokens.append(token)
        text.left -= 1
        if text.left == 0 or token == self.eot_token_id:
            return True
        so_far = self.text.decode(text.tokens)
        return any(stop in so_far for stop in text.stops)

    def _finish(self, text: Generation) -> str:
        said = self.text.decode(text.tokens)
        for stop in text.stops:
            said = said.split(stop)[0]
        return said


class MegatronLM(CheckedLM, RowsLM):
    """A Megatron model as a task meets it: with what CheckedLM refuses."""


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
