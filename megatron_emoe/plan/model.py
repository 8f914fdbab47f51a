"""The model that a plan is for: its flags by name or file, read with Megatron's own parser. Nothing is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_emoe.host import mode as host_mode
from megatron_emoe.model.flops import moe_layer_numbers
from megatron_emoe.plan import kept
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.elastic_config import ElasticConfig, elastic_settings, flag
from megatron_emoe.settings.k_schedule import expected_k, k_probabilities

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

MODELS = {
    "olmoe-7b": "olmoe_1b_7b.args",
    "qwen1.5-moe-14b": "qwen1_5_moe_a2_7b.args",
    "deepseek-v2-lite-16b": "deepseek_v2_lite.args",
    "ernie-4.5-21b": "ernie4_5_21b_a3b.args",
    "moonlight-16b": "moonlight_16b_a3b.args",
    "qwen3-30b": "qwen3_30b_a3b.args",
    "mixtral-47b": "mixtral_8x7b.args",
    "granite-1b": "granite_3_0_1b_a400m.args",
    "llama2-7b-lora": "../llama_2_7b_lora.args",
}
"""Name of a released model -> its flag file, from examples/models; the last has low-rank experts on a dense one."""

OF_THE_LAYOUT = {
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--expert-model-parallel-size": "--ep",
    "--expert-tensor-parallel-size": "--etp",
    "--micro-batch-size": "--micro-batch",
    "--global-batch-size": "--global-batch",
    "--seq-length": "--seq",
    "--fp8-format": "--precision",
    "--use-precision-aware-optimizer": "--optimizer-state",
}
"""Flags of Megatron that the planner chooses -> its own flag for the same."""

CHOICES = ("--precision", "--optimizer-state")
"""Those of the planner's own flags for them that stand for several of Megatron's."""

SETTLED = ["--use-distributed-optimizer", "--moe-token-dispatcher-type", "alltoall"]
"""Flags of every plan."""

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
    "grad_reduce_in_bf16": "gradients in bf16 by this flag; --optimizer-state has them",
    "hidden_dropout": "the masks of dropout",
    "rampup_batch_size": "a batch that grows",
    "step_batch_size_schedule": "a batch that grows",
    "account_for_loss_in_pipeline_split": "stages split by flags; the plan splits them",
    "account_for_embedding_in_pipeline_split": "stages split by flags; the plan splits them",
    "decoder_first_pipeline_num_layers": "stages split by flags; the plan splits them",
    "decoder_last_pipeline_num_layers": "stages split by flags; the plan splits them",
    "pipeline_model_parallel_layout": "stages split by flags; the plan splits them",
    "heterogeneous_layers_config_path": "layers that differ",
}
"""Settings that change memory or traffic in ways that the formulas of a plan do not know -> what they stand for."""

_PLANNED_ALONE = {
    "emoe_train": ("all", "gradients and optimizer of a part of the weights"),
    "optimizer": ("adam", "the state of another optimizer"),
    "context_parallel_size": (1, "context parallelism"),
}
"""Settings of which a plan knows one value -> that value, and what the others stand for."""


@dataclass(frozen=True)
class PlannedModel:
    """name: as given. words: its flags and those of the recipe, as a shell takes them (flag files by name). args:
    Megatron's, completed for one rank. added: flags that the plan counts on and that are not among the model's."""

    name: str
    words: tuple[str, ...]
    args: Namespace
    added: tuple[str, ...] = ()

    @cached_property
    def config(self) -> ElasticConfig:
        """The elastic settings among `args`."""
        return elastic_settings(self.args)

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
    def passes(self) -> int:
        """Of every micro-batch through the model; both are kept until its backward pass. E[k] is their mean."""
        return 2 if self.config.emoe_second_pass else 1

    @property
    def largest_k(self) -> int:
        """k_max, experts: the largest that the schedule draws."""
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


def read_model(
    name: str,
    recipe: str | None,
    seq_length: int | None,
    keep_in: Path | None = None,
    *,
    bf16: bool = False,
    elastic: Sequence[str] = (),
) -> PlannedModel:
    """The model `name` (one of MODELS, or a flag file) with the elastic settings of the flag file `recipe`, and then
    those in `elastic`, flags with their values.

    seq_length: tokens; None: 4096, or the model's longest sequence where that is shorter. keep_in: a folder for what
    Megatron says of the flags (see kept.py); where it says it anew, this process is in host mode from then on. bf16:
    train it in bf16 also where its flags are those of a model in fp32.

    Raises:
        ValueError: no such model or file, flags that Megatron or the elastic settings refuse, or that a plan does not
            know or chooses itself.
    """
    files = [_model_file(name), *([Path(recipe)] if recipe else [])]
    words = flag_files.expand([f"@{file}" for file in files])
    words += elastic
    _refuse_layout(words)
    added = ["--bf16"] if bf16 and not {"--bf16", "--fp16"} & set(words) else []
    words += added
    args = kept.arguments([*words, f"{seq_length}"], lambda: _completed(words, seq_length), keep_in)
    if args.vocab_size is None and args.padded_vocab_size is None:
        raise ValueError(f"--model {name}: its flags need --vocab-size, which decides the size of embedding and head")
    known = (*(f"@{file}" for file in files), *elastic, *added)
    return PlannedModel(name, known, args, tuple(added))


def _completed(words: list[str], seq_length: int | None) -> Namespace:
    """Megatron's arguments for these flags, as a run of one rank completes them (ValueError: refused)."""
    host_mode.enable(force=True)  # a plan asks nothing of a GPU
    from megatron_emoe.training.arguments import completed, parsed

    args = parsed(words, SETTLED)
    _refuse_unknown(args)
    args.seq_length = seq_length
    try:
        return completed(args)
    except ValueError as error:
        raise ValueError(f"the flags of the model are refused: {error}") from error


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


def _refuse_unknown(args: Namespace) -> None:
    """ValueError for what no formula of a plan knows."""
    for name, meaning in _NOT_PLANNED.items():
        value = getattr(args, name)
        if value:
            given = flag(name) if value is True else f"{flag(name)} {value}"
            raise ValueError(f"{given}: a plan does not know {meaning}")
    for name, (known, meaning) in _PLANNED_ALONE.items():
        if getattr(args, name) != known:
            raise ValueError(f"{flag(name)} {getattr(args, name)}: must be {known}, a plan does not know {meaning}")
    if args.num_experts is None and args.emoe_lora_experts is None:
        raise ValueError("--num-experts is not among the flags of the model: a plan is for one with experts")
    if args.fp16 and not args.bf16:
        raise ValueError("--fp16 among the flags of the model: a plan counts weights and activations in bf16")
    if not args.bf16:
        cause = "its weights are fp32, and a plan counts weights and activations in bf16"
        raise ValueError(f"--bf16 is not among the flags of the model: {cause}; --precision bf16 trains it so")
    if args.emoe_selection == "top-p":
        raise ValueError("--emoe-selection top-p: E[k] depends on the data, a plan cannot know it")
