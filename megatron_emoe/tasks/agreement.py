"""Whether answers flip between budgets: the share of a task's documents with the same answer at k' as at the trained k.

A score does not say it: two budgets of one accuracy may be right on different documents (MoE-PHDS, arXiv 2509.23012).
Pure functions over what lm-eval gives; nothing imports torch or lm-eval.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

_LETTERS = 16
"""Of the digest that stands for a text."""


def answers_of(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """What a model answered, by task, document by document in lm-eval's order.

    Of several choices the number of the likeliest (from 0, by the sum of its tokens' log-probabilities: what `acc`
    judges, not `acc_norm`), of one continuation whether it is the greedy one, of a text a digest. A task that asks for
    probabilities alone, such as a perplexity, has no answers. samples: lm-eval's logged samples; of several filters the
    first.
    """
    found = {}
    for task, logged in samples.items():
        first = [sample for sample in logged if sample.get("filter") == logged[0].get("filter")]
        ordered = sorted(first, key=lambda sample: sample["doc_id"])
        texts = [_answer(sample["filtered_resps"]) for sample in ordered]
        if texts and None not in texts:
            found[task] = tuple(text for text in texts if text is not None)
    return found


def _answer(responses: Sequence[Any]) -> str | None:
    """One document's; None where its responses are no answer."""
    if all(_is_likelihood(response) for response in responses):
        if len(responses) == 1:
            return "greedy" if responses[0][1] else "other"
        likelihoods = [response[0] for response in responses]
        return str(likelihoods.index(max(likelihoods)))
    if any(isinstance(response, int | float) for response in responses):
        return None
    return hashlib.sha256(json.dumps(responses, default=str).encode()).hexdigest()[:_LETTERS]


def _is_likelihood(response: Any) -> bool:
    """Whether it is a log-probability with whether the continuation is the greedy one."""
    return isinstance(response, list | tuple) and len(response) == 2 and isinstance(response[1], bool)


def agreement(answers: Mapping[str, Sequence[str]], at_k: Mapping[str, Sequence[str]]) -> float | None:
    """The share of documents with the same answer in both, between 0 and 1; None where they have no task in common, or
    not the same documents of it."""
    tasks = [task for task in answers if task in at_k]
    if not tasks or any(len(answers[task]) != len(at_k[task]) for task in tasks):
        return None
    same = sum(one == other for task in tasks for one, other in zip(answers[task], at_k[task], strict=True))
    return same / sum(len(answers[task]) for task in tasks)
