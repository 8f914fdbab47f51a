"""The model that a plan is for: its flags by name or file, read with Megatron's own parser. Nothing is built."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megatron.training.arguments import parse_args, validate_args

from megatron_emoe import flag_files
from megatron_emoe.active_k import expected_k, k_probabilities
from megatron_emoe.arguments import add_arguments, command_line
from megatron_emoe.elastic_config import flag
from megatron_emoe.flops import moe_layer_numbers
from megatron_emoe.transformer_config import ElasticTransformerConfig, elastic_config_from_args

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MODELS = {
    "olmoe-7b": "olmoe_1b_7b.args",
    "qwen1.5-moe-14b": "qwen1_5_moe_a2_7b.args",
    "deepseek-v2-lite-16b": "deepseek_v2_lite.args",
    "ernie-4.5-21b": "ernie4_5_21b_a3b.args",
}
"""Name of a released model -> its flag file in examples/models."""

OF_THE_LAYOUT = {
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--expert-model-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--etp",
    "--micro-batch-size": "--micro-batch",
    "--global-batch-size": "--global-batch",
    "--seq-length": "--seq",
}
"""Flags of Megatron that the planner chooses -> its own flag for the same."""

_NOT_PLANNED = {
    "mtp_num_layers": "layers that predict further tokens",
    "emoe_distill_coeff": "the teacher's forward pass",
    "num_layers_per_virtual_pipeline_stage": "interleaved pipelines",
    "num_virtual_stages_per_pipeline_rank": "interleaved pipelines",
    "q_lora_rank": "compressed queries",
    "moe_latent_size": "experts in a latent space",
    "moe_expert_capacity_factor": "dropped and padded tokens",
    "experimental_attention_variant": "another attention",
    "attention_output_gate": "a gate behind the attention",
    "window_size": "attention within a window",
    "moe_layer_recompute": "recomputation set by flags; the plan chooses it",
    "recompute_granularity": "recomputation set by flags; the plan chooses it",
}
"""Settings that change memory or traffic in ways that the formulas of a plan do not know -> what they stand for."""


@dataclass(frozen=True)
class PlannedModel:
    """name: as given. words: its flags and those of the recipe, as a shell takes them (flag files by name). args:
    Megatron's, completed for one rank. config: with the elastic fields."""

    name: str
    words: tuple[str, ...]
    args: Namespace
    config: ElasticTransformerConfig

    @property
    def moe_layers(self) -> list[int]:
        """Numbers of the layers with experts, from 1."""
        return moe_layer_numbers(self.args)

    @property
    def expected_k(self) -> float:
        """E[k], true experts per token: of the schedule after any ramp; null experts take their balanced share."""
        k = expected_k(self.config, self.args.moe_router_topk, self._end)
        null = self.args.emoe_null_experts or 0
        return k * self.args.num_experts / (self.args.num_experts + null)

    @property
    def largest_k(self) -> int:
        """k_max, experts: the largest that the schedule draws; with top-p the limit, or all experts."""
        if self.args.emoe_selection == "top-p":
            return self.args.emoe_top_p_max or self.args.num_experts
        return self.config.k_range(self.args.moe_router_topk)[1]

    @property
    def k_distribution(self) -> dict[int, float]:
        """Probability of each k in training; where every token has its own k, all of it on E[k]'s next integer."""
        if self.config.counts_vary:
            return {min(self.args.num_experts, -int(-self.expected_k // 1)): 1.0}
        return k_probabilities(self.config, self.args.moe_router_topk, self._end)

    @property
    def _end(self) -> int:
        """An iteration when ramps are over."""
        return self.config.emoe_k_ramp_iters or 0


def read_model(name: str, recipe: str | None, seq_length: int | None) -> PlannedModel:
    """The model `name` (one of MODELS, or a flag file) with the elastic settings of the flag file `recipe`.

    seq_length: tokens; None: 4096, or the model's longest sequence where that is shorter.

    Raises:
        ValueError: no such model or file, flags that Megatron or the elastic settings refuse, or that a plan does not
            know or chooses itself.
    """
    files = [_model_file(name), *([Path(recipe)] if recipe else [])]
    words = flag_files.expand([f"@{file}" for file in files])
    _refuse_layout(words)
    length = min(4096, _longest(words)) if seq_length is None else seq_length
    args, config = _read([*words, "--micro-batch-size", "1", "--seq-length", str(length)])
    for setting, meaning in _NOT_PLANNED.items():
        value = getattr(args, setting, None)
        if value:
            raise ValueError(f"{flag(setting)} {value}: a plan does not know {meaning}")
    if args.emoe_train != "all":
        raise ValueError(f"--emoe-train {args.emoe_train}: a plan counts gradients and optimizer of all weights")
    if args.vocab_size is None:
        raise ValueError(f"--model {name}: its flags need --vocab-size, which decides the size of embedding and head")
    return PlannedModel(name, tuple(f"@{file}" for file in files), args, config)


def _model_file(name: str) -> Path:
    if name in MODELS:
        return EXAMPLES / "models" / MODELS[name]
    path = Path(name.removeprefix("@"))
    if not path.is_file():
        raise ValueError(f"--model {name}: neither a flag file nor one of {', '.join(MODELS)}")
    return path


def _refuse_layout(words: Sequence[str]) -> None:
    for word in words:
        own = OF_THE_LAYOUT.get(word.partition("=")[0])
        if own is not None:
            raise ValueError(f"{word} in the flags of the model: the plan chooses it; give {own} to the planner")


def _longest(words: Sequence[str]) -> int:
    given = dict(pairwise([*words, ""]))
    return int(given.get("--max-position-embeddings", "4096"))


def _read(words: list[str]) -> tuple[Namespace, ElasticTransformerConfig]:
    """Megatron's own parse for one rank: what it says to a reader of logs is left out, what it refuses is raised."""
    try:
        with command_line(words), contextlib.redirect_stdout(io.StringIO()):
            args = parse_args(add_arguments)
            args.rank, args.world_size = 0, 1
            validate_args(args)
        return args, elastic_config_from_args(args)
    except AssertionError as error:  # the core checks its own flags by assertions
        raise ValueError(f"Megatron refuses the flags of the model: {error}") from error
