"""tools/eval_tasks.py on a Megatron checkpoint: arguments, tokenizer, model; rank 0 runs lm-eval, the others follow."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_tokenizer
from megatron.training.initialize import initialize_megatron

from megatron_emoe.hf.companions import HF_FOLDER
from megatron_emoe.hf.import_model import tokenizer_flags
from megatron_emoe.model.checkpoint import iteration_of, locate, stored_args
from megatron_emoe.model.layer_spec import elastic_model_config
from megatron_emoe.routing.transformer_config import check_ks
from megatron_emoe.settings.flag_types import path_word
from megatron_emoe.settings.refusal import fail
from megatron_emoe.settings.tail_scale import parse_tail_scale
from megatron_emoe.tasks.forward_server import ForwardServer, check_layout, control_group, from_rank_0
from megatron_emoe.tasks.lm_eval_model import MegatronLM, Text
from megatron_emoe.tasks.request import add_arguments
from megatron_emoe.tasks.results import Passage, TaskSettings, TasksResult, resume
from megatron_emoe.tasks.run import (
    check,
    check_selection,
    find_tasks,
    finished,
    load_tasks,
    report_table,
    run_cells,
)
from megatron_emoe.training.arguments import parse_evaluation
from megatron_emoe.training.held_out import load_model

_FIXED: dict[str, Any] = {
    "skip_train": True,
    "no_load_optim": True,
    "no_load_rng": True,
    "mock_data": True,  # the texts come from lm-eval
    "mtp_num_layers": None,
    "moe_expert_capacity_factor": None,  # a token that is dropped for its neighbours' sake has no score of its own
}


class MegatronTaskModel:
    """`lm` for lm-eval, and `active` to run it at k'. On rank 0."""

    def __init__(self, lm: MegatronLM) -> None:
        self.lm = lm

    def active(self, k: int) -> AbstractContextManager[Passage]:
        """Inside, k' = `k`. The value is complete on the way out: what went through the model inside."""
        return self.lm.server.active(k)


def run(header: Callable[..., TasksResult]) -> None:
    """The whole program, on every rank; the command line is this process's own."""
    args = _parse()
    try:
        result = _header(args, header)
        manager, names = find_tasks(args)
        if finished(args, result, manager, names):
            return
    except ValueError as error:
        fail(error)
    initialize_megatron()
    group, leads = control_group(), torch.distributed.get_rank() == 0
    tasks: dict[str, Any] = {}
    problem = None
    if leads:
        try:
            tasks = load_tasks(manager, names)
        except ValueError as error:
            problem = error
    if (problem := from_rank_0(group, problem)) is not None:
        fail(problem)
    server = build_server(args, group)
    if not leads:
        server.serve()
        return
    try:
        model = MegatronTaskModel(make_lm(args, server, result.settings.max_length))
        result = run_cells(args, result, model, tasks)
    finally:
        server.stop()
    report_table(result)


def build_server(args: Namespace, group: Any) -> ForwardServer:
    """The checkpoint's model, ready to answer. Collective."""
    model = load_model(args, elastic_model_config(args))
    return ForwardServer(args, model, args.vocab_size or get_tokenizer().vocab_size, group)


def make_lm(args: Namespace, server: ForwardServer, max_length: int) -> MegatronLM:
    """lm-eval's model interface, with the tokenizer of the arguments."""
    return MegatronLM(server, Text(get_tokenizer()), batch=args.micro_batch_size, max_length=max_length)


def _parse() -> Namespace:
    fixed = dict(_FIXED)
    given = {word.partition("=")[0] for word in sys.argv[1:]}
    if not given & {"-h", "--help"}:
        try:
            if not given & {"--tokenizer-type", "--tokenizer-model"}:
                fixed |= choose_tokenizer(_load_flag(sys.argv[1:]))
        except ValueError as error:
            fail(error)
    if "--micro-batch-size" not in given:
        fixed["micro_batch_size"] = 8
    return parse_evaluation(add_more, **fixed)


def add_more(parser: ArgumentParser) -> ArgumentParser:
    """The flags beside Megatron's own."""
    return add_arguments(parser)


def _load_flag(words: list[str]) -> tuple[str | None, int | None]:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--load", type=path_word)
    parser.add_argument("--ckpt-step", type=int)
    known, _ = parser.parse_known_args(words)
    return known.load, known.ckpt_step


def choose_tokenizer(source: tuple[str | None, int | None]) -> dict[str, Any]:
    """Flags of the tokenizer that belongs to a checkpoint (folder, iteration): the stored ones where their files are
    still there, else those of the folder hf/ beside it.

    Raises:
        ValueError: no checkpoint, or neither has a tokenizer for text.
    """
    folder, step = source
    if folder is None:
        raise ValueError("--load is not given: which checkpoint?")
    stored = stored_args(locate(folder, step))
    kind, model = getattr(stored, "tokenizer_type", None), getattr(stored, "tokenizer_model", None)
    if kind not in (None, "NullTokenizer") and (model is None or Path(model).exists()):
        return {}
    companion = Path(folder) / HF_FOLDER
    flags = tokenizer_flags(companion, companion)
    if "tokenizer_model" not in flags:
        lost = f"its {kind} {model} is gone" if model else f"it was saved with {kind}"
        raise ValueError(
            f"--load {folder}: no tokenizer for text ({lost}, no {companion}); "
            "give --tokenizer-type and --tokenizer-model"
        )
    return flags


def _header(args: Namespace, header: Callable[..., TasksResult]) -> TasksResult:
    """The result so far. Nothing is built yet (ValueError: refused)."""
    check_layout(args)
    check_selection(args)
    max_length = check(args, args.num_experts, args.max_position_embeddings)
    check_ks(args, "--k", dict.fromkeys(args.k))
    checkpoint = locate(args.load, args.ckpt_step)
    table = parse_tail_scale(args.emoe_tail_scale).table if args.emoe_tail_scale else ()
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    settings = TaskSettings(shots=args.num_fewshot, limit=args.limit, max_length=max_length, dtype=dtype)
    fresh = header(
        args,
        framework="megatron",
        iteration=iteration_of(checkpoint),
        k_train=stored_args(checkpoint).moe_router_topk,
        num_experts=args.num_experts,
        tail_scale={str(k): scale for k, scale in table},
        settings=settings,
    )
    return resume(args.out, fresh, args.label)
