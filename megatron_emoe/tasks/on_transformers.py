"""A transformers model for tools/eval_tasks.py: lm-eval's own HFLM at any k', with what passed through counted."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_emoe.hf.active_experts import counting_rows, set_active_experts, trained_k
from megatron_emoe.hf.architecture import experts_in
from megatron_emoe.hf.import_model import tokenizer_flags
from megatron_emoe.hf.one_process import silent_transformers
from megatron_emoe.hf.registry import read_config, read_moe_config
from megatron_emoe.settings.elastic_rules import check_tail_scale
from megatron_emoe.settings.refusal import NoNumber
from megatron_emoe.settings.tail_scale import parse_tail_scale
from megatron_emoe.tasks.checked import CheckedLM
from megatron_emoe.tasks.results import Passage, TaskSettings, TasksResult, resume
from megatron_emoe.tasks.run import check, find_tasks, finished, load_tasks, report_table, run_cells


class CheckedHFLM(CheckedLM, HFLM):
    """lm-eval's own model around transformers, with what CheckedLM refuses, and generations without numbers."""

    def _model_generate(self, context: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        """As HFLM's. context: int64 [B, S], padded on the left. NoNumber: logits that are none."""

        def check(_model: nn.Module, _inputs: tuple, output: Any) -> None:
            largest_B = output.logits[:, -1].amax(dim=-1)
            if not largest_B.isfinite().all():  # sync: evaluation only
                row = int((~largest_B.isfinite()).nonzero()[0])
                asked = self.tok_decode(context[row])
                raise NoNumber(f"after {asked[-_SHOWN:]!r}: the logits of the next token are no numbers")

        hook = self.model.register_forward_hook(check)
        try:
            return super()._model_generate(context, *more, **kwargs)
        finally:
            hook.remove()


_SHOWN = 40
"""Characters of a prompt that a message shows."""


class HfTaskModel:
    """`lm` for lm-eval, and `active` to run it at k'. tail_scale: as set_active_experts takes it."""

    def __init__(self, lm: HFLM, tail_scale: Mapping[int, float] | None = None) -> None:
        self.lm, self.tail_scale = lm, tail_scale

    @contextmanager
    def active(self, k: int) -> Iterator[Passage]:
        """Inside, k' = `k`. The value is complete on the way out: what went through the model inside."""
        set_active_experts(self.lm.model, k, self.tail_scale)
        passage = Passage()
        hook = self.lm.model.get_input_embeddings().register_forward_pre_hook(_token_counter(passage))
        try:
            with counting_rows(self.lm.model) as rows:
                yield passage
        finally:
            hook.remove()
        passage.rows = rows


def _token_counter(passage: Passage) -> Callable[[nn.Module, tuple], None]:
    def count(_embedding: nn.Module, inputs: tuple) -> None:
        passage.tokens += inputs[0].numel()

    return count


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder (ValueError: there is none that can be read)."""
    if "tokenizer_model" not in tokenizer_flags(folder, folder):  # transformers would make up an empty one
        raise ValueError(f"--load {folder}: no tokenizer in it (tokenizer.json, tokenizer.model or vocab.json)")
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # what is wrong with the files ends in transformers, or in the library below it
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"--load {folder}: its tokenizer cannot be loaded ({why})") from error


def load_model(folder: Path, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model in a folder, in evaluation mode. dtype: "auto" for the stored one, or torch's name of a type.

    Raises:
        ValueError: weights that are not in its files; transformers would go on with random numbers.
    """
    wanted = "auto" if dtype == "auto" else getattr(torch, dtype)
    with silent_transformers():
        model, loading = AutoModelForCausalLM.from_pretrained(
            str(folder), config=read_config(folder), dtype=wanted, trust_remote_code=False, output_loading_info=True
        )
    lost = [*loading["missing_keys"], *loading["mismatched_keys"]]
    if lost:
        raise ValueError(f"--load {folder}: not in its files, or of another shape: {', '.join(map(str, lost))}")
    return model.to(device).eval()


def run(args: Namespace, header: Callable[..., TasksResult]) -> None:
    """tools/eval_tasks.py on a Hugging Face folder (ValueError: refused before the model is loaded)."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(f"WORLD_SIZE {os.environ['WORLD_SIZE']}: --model hf runs in one process, without torchrun")
    config = read_moe_config(args.load)
    max_length = check(args, experts_in(config), config.max_position_embeddings)
    if args.micro_batch_size < 1:
        raise ValueError(f"--micro-batch-size {args.micro_batch_size}: must be at least 1")
    stored = getattr(config, "emoe", None) or {}  # what an export says of its training
    words = args.emoe_tail_scale or stored.get("tail_scale")
    check_tail_scale(words, trained_k(config), experts_in(config))
    tail = dict(parse_tail_scale(words).table) if words else {}
    dtype = str(config.dtype).removeprefix("torch.") if args.dtype == "auto" else args.dtype
    settings = TaskSettings(shots=args.num_fewshot, limit=args.limit, max_length=max_length, dtype=dtype)
    fresh = header(
        args,
        framework="transformers",
        iteration=0,
        k_train=trained_k(config),
        num_experts=experts_in(config),
        tail_scale={str(k): scale for k, scale in tail.items()},
        settings=settings,
    )
    result = resume(args.out, fresh, args.label)
    manager, names = find_tasks(args)
    if finished(args, result, manager, names):
        return
    tokenizer = load_tokenizer(args.load)
    tasks = load_tasks(manager, names)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.host_mode else "cpu")
    model = load_model(args.load, args.dtype, device)
    lm = CheckedHFLM(model, tokenizer=tokenizer, batch_size=args.micro_batch_size, max_length=max_length)
    report_table(run_cells(args, result, HfTaskModel(lm, tail), tasks))
