"""From the command line to checked arguments: Megatron's flags plus the group "elastic MoE"."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

from megatron_emoe.data.datasets import check_data
from megatron_emoe.host import mode as host_mode
from megatron_emoe.model.checkpoint import (
    check_budgets,
    check_load,
    fitted_tail_scale,
    has_checkpoint,
    locate,
    stored_args,
)
from megatron_emoe.model.flops import check_moe_layers
from megatron_emoe.model.stored_model import check_given, model_flags
from megatron_emoe.routing.transformer_config import elastic_config_from_args
from megatron_emoe.routing.watch import check_marker
from megatron_emoe.settings.command_line import in_own_words, is_first_rank, say
from megatron_emoe.settings.companion_folder import tokenizer_now
from megatron_emoe.settings.elastic_config import elastic_settings, flag
from megatron_emoe.settings.field_flags import add_elastic_flags
from megatron_emoe.settings.in_force import settings_in_force
from megatron_emoe.settings.lora_rules import settle_experts
from megatron_emoe.settings.refusal import fail
from megatron_emoe.training.batch_schedule import check_batch_schedule, settle_ramp
from megatron_emoe.training.first_look import check_source
from megatron_emoe.training.listing import short_listing
from megatron_emoe.training.ranks import settle_ranks
from megatron_emoe.training.start_rules import check_cache, check_start, settle_accumulation
from megatron_emoe.training.teacher import check_teacher
from megatron_emoe.training.training_rules import check_elastic_training


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the groups "elastic MoE" and "host mode"; flags, help and defaults come from the ElasticConfig fields."""
    add_elastic_flags(parser)
    for action in parser._actions:
        if action.type is not None:
            action.type = _or_refuse(action.type)
    return host_mode.add_arguments(parser)


def _or_refuse(kind: Any) -> Callable[[str], Any]:
    """The same reader of a value; what it raises is one that argparse knows (some of the core's call eval())."""

    @wraps(kind)
    def read(word: str) -> Any:
        try:
            return kind(word)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            raise
        except Exception as error:
            raise argparse.ArgumentTypeError(f"{word}: not readable ({type(error).__name__}: {error})") from error

    return read


def parse(add_more: Callable[[ArgumentParser], ArgumentParser] = lambda parser: parser, **fixed: object) -> Namespace:
    """Parse, complete and check the command line of a training run, then hand it to Megatron's globals.

    Everything that can be refused is refused before a folder, a log or a process group exists. add_more: flags of
    another entry point. fixed: values that this entry point sets whatever the command line says.

    Raises:
        SystemExit: status 2 after one message on stderr (from local rank 0).
    """
    args = _parse(_complete_training, add_more, fixed, check_elastic_training)
    if settings := settings_in_force(elastic_settings(args), sys.argv[1:]):
        say(settings)
    return args


HfArguments = Callable[[Path], tuple[Namespace, dict[str, Any] | None]]
"""The arguments that an import of a Hugging Face folder would store, and the block "emoe" of its config.json."""


def parse_evaluation(
    add_more: Callable[[ArgumentParser], ArgumentParser],
    hf_arguments: HfArguments | None = None,
    *,
    needs_experts: bool = True,
    **fixed: object,
) -> Namespace:
    """The same for a tool that evaluates --load (or --hf, which `hf_arguments` then reads): the model's flags come from
    there unless given; its k and its shape cannot be given otherwise. With --hf, `hf_settings` of the result is the
    block "emoe" of config.json, or None, and `hf_combine` the model's own rule. needs_experts: refuse a dense model,
    which has no k'."""
    return _parse(partial(_complete_evaluation, hf_arguments, needs_experts), add_more, fixed)


def _parse(
    complete: Callable[[Namespace, ArgumentParser, dict], None],
    add_more: Callable,
    fixed: dict,
    check: Callable[[Namespace], None] = lambda args: None,
) -> Namespace:
    parsers = []

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(add_more(add_arguments(parser)))
        parser.error = lambda message: fail(in_own_words(message, parser))  # type: ignore[method-assign]
        return parser

    if not is_first_rank() and {"-h", "--help"} & set(sys.argv):
        sys.exit(0)  # one help text is enough
    if any(word.partition("=")[0] == "--yaml-cfg" for word in sys.argv):
        fail("--yaml-cfg: not supported, the core would ignore every flag; give the settings as flags")
    args = parse_args(add_all)
    vars(args).update(fixed)
    try:
        complete(args, parsers[0], fixed)
        check_data(args)
        elastic_config_from_args(args)
        _refuse_several_validation_sets(args)
        check(args)
    except (ValueError, AssertionError) as error:  # the core checks its own flags by assertions
        fail(str(error) or _broken_rule(error))
    except OSError as error:
        fail(f"{error.filename}: cannot be read ({error.strerror})")
    _set_globals(args)
    return args


def _set_globals(args: Namespace) -> None:
    """Megatron's; a service that it logs to may not let this user in."""
    try:
        set_global_variables(args)
    except Exception as error:
        if not type(error).__module__.startswith("wandb."):
            raise
        fail(f"--wandb-project {args.wandb_project}: {error}")


def _refuse_several_validation_sets(args: Namespace) -> None:
    if args.multiple_validation_sets and args.emoe_eval_k:
        raise ValueError("--emoe-eval-k cannot be combined with --multiple-validation-sets: give one validation set")


def _broken_rule(error: Exception) -> str:
    """What an assertion of the core without a message demands: its line of source."""
    rule = traceback.extract_tb(error.__traceback__)[-1]
    where = f"({os.path.basename(rule.filename)}, line {rule.lineno})"
    if missing := re.fullmatch(r"assert args\.(\w+) is not None,?", rule.line or ""):
        return f"{flag(missing[1])} is not given, and Megatron demands it here {where}"
    return f"Megatron demands: {rule.line} {where}"


def _complete_training(args: Namespace, parser: ArgumentParser, fixed: dict) -> None:
    if args.use_checkpoint_args:
        if args.load is None:
            raise ValueError("--use-checkpoint-args needs --load, which is not given")
        if has_checkpoint(args.load):
            locate(args.load, args.ckpt_step)  # the core ends the process with status 0 where this raises
        load_args_from_checkpoint(args)
        _keep_asked_k(args, _given(parser))
    settle_experts(args)
    if args.eval_interval is None:
        args.eval_interval = sys.maxsize  # by its help no evaluation during training; the core then divides by it
    check_sizes(args)
    if args.lr is not None and args.lr_warmup_init > args.lr:
        raise ValueError(f"--lr-warmup-init {args.lr_warmup_init}: must not exceed --lr {args.lr}")
    settle_ramp(args)
    check_start(args)
    settle_ranks(args)
    with short_listing(parser):
        validate_args(args)
    settle_accumulation(args)
    check_batch_schedule(args, begins=args.load is None or args.finetune or not has_checkpoint(args.load))
    check_marker(args.save)
    check_load(args, report=say)
    check_teacher(args)


def _complete_evaluation(
    hf_arguments: HfArguments | None, needs_experts: bool, args: Namespace, parser: ArgumentParser, fixed: dict
) -> None:
    given = _given(parser) | fixed
    stored = _evaluated(args, hf_arguments)
    source = f"--hf {args.hf}" if getattr(args, "hf", None) else f"--load {args.load}"
    if needs_experts and not stored.num_experts:
        raise ValueError(f"{source}: a dense model, it has no experts and so no k'")
    check_given(given, stored, source)
    for name, value in model_flags(stored).items():
        if name not in given:
            setattr(args, name, value)
    settle_experts(args)
    check_budgets(args, stored, source)
    if "padded_vocab_size" not in given and stored.padded_vocab_size is not None:
        # A model may have more rows than its tokenizer has tokens, so the tokenizer does not tell how many.
        ranks = args.tensor_model_parallel_size
        args.padded_vocab_size = -(-stored.padded_vocab_size // ranks) * ranks
    check_cache(args)
    settle_ranks(args)
    with short_listing(parser):
        validate_args(args)


def _evaluated(args: Namespace, hf_arguments: HfArguments | None) -> Namespace:
    """The arguments of the model to evaluate: stored with --load, or those that an import of --hf would store."""
    check_source(args)
    hf = getattr(args, "hf", None)
    if hf is None or hf_arguments is None:
        checkpoint = locate(args.load, args.ckpt_step)
        stored = stored_args(checkpoint)
        stored.emoe_tail_scale = fitted_tail_scale(checkpoint) or getattr(stored, "emoe_tail_scale", None)
        stored.tokenizer_model = tokenizer_now(getattr(stored, "tokenizer_model", None), Path(args.load))
        return stored
    stored, args.hf_settings = hf_arguments(Path(hf))
    args.hf_combine = stored.emoe_combine
    return stored


def _given(parser: ArgumentParser) -> dict[str, object]:
    """The flags that stand on the command line, by name, without any default."""
    defaults = [(action, action.default) for action in parser._actions]
    for action, _ in defaults:
        action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_args())
    finally:
        for action, default in defaults:
            action.default = default


def _keep_asked_k(args: Namespace, given: dict[str, object]) -> None:
    """The core lets the stored k overwrite the one on the command line without a word; here the one asked for wins."""
    asked = given.get("moe_router_topk", args.moe_router_topk)
    if asked != args.moe_router_topk:
        say(f"--moe-router-topk {asked} as asked, although the checkpoint was saved with {args.moe_router_topk}")
        args.moe_router_topk = asked


def stored_form(words: list[str]) -> Namespace:
    """The arguments that a training run with these model flags would store in its checkpoints.

    What is not a matter of the model (batch, parallel layout, kernels) has its default. ValueError as in completed.
    """
    return completed(parsed(words))


_ON_THE_GPU = ("fusion", "overlap", "cuda_graph", "grouped_gemm", "deepep", "flash_attn", "delay_wgrad", "dispatcher")
"""Words in the names of settings that change how a step runs on a GPU, and no number of a plan."""


def parsed(words: list[str], settled: list[str] | None = None) -> Namespace:
    """Megatron's arguments as its parser leaves them; nothing is checked but that each flag has a value of its type.

    settled: flags that win over `words`. Where they are given, kernels and overlap are as if `words` did not name them:
    no GPU is asked for.
    """
    with command_line(words if settled is None else settled), refusing():
        without = parse_args(add_arguments)
        if settled is None:
            return without
        sys.argv[1:1] = words
        args = parse_args(add_arguments)
        hidden = [name for name in vars(args) if any(word in name for word in _ON_THE_GPU)]
        vars(args).update({name: getattr(without, name) for name in hidden})
        return args


def completed(args: Namespace, world_size: int = 1) -> Namespace:
    """`args` as Megatron and the elastic settings complete them for the first rank of a run; nothing is started.

    A micro-batch and a length that are not given are one sequence of at most 4096 tokens.

    Raises:
        ValueError: what they refuse.
    """
    with refusing():
        settle_experts(args)
        check_sizes(args)
        args.rank, args.world_size = 0, world_size
        args.micro_batch_size = args.micro_batch_size or 1
        args.seq_length = args.seq_length or min(4096, args.max_position_embeddings or 4096)
        validate_args(args)
        elastic_config_from_args(args)
    return args


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Inside, nothing is printed, and what Megatron refuses, in whatever way, is a ValueError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:  # argparse, after pages of usage
        raise ValueError(said.getvalue().strip().rpartition("error: ")[2] or f"exit status {error.code}") from error
    except AssertionError as error:
        raise ValueError(str(error) or _broken_rule(error)) from error
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read ({error.strerror})") from error


_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts", "moe_ffn_hidden_size")


def check_sizes(args: Namespace) -> None:
    """ValueError where a size of the model is no size, or --moe-layer-freq is no pattern of its layers."""
    for name in _SIZES:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)} {getattr(args, name)}: must be at least 1")
    if args.moe_apply_probs_on_input and args.moe_router_topk != 1:
        raise ValueError(f"--moe-apply-probs-on-input: needs --moe-router-topk 1, not {args.moe_router_topk}")
    check_moe_layers(args)


@contextlib.contextmanager
def command_line(words: list[str]) -> Iterator[None]:
    """Inside, Megatron's parser reads these words, and what host mode adds to them, for this program's own.

    Raises:
        ValueError: a flag that host mode cannot serve.
    """
    before = sys.argv
    with contextlib.redirect_stdout(io.StringIO()):
        sys.argv = [before[0], *host_mode.setup(words)]
    try:
        yield
    finally:
        sys.argv = before
