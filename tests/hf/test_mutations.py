"""A conversion with one fault must not pass: neither the check of layers after the import, nor the proof of the whole.

Each mutation changes one thing in a name table or in the flags of an architecture, imports a tiny model with it, and
asks both. A fault in a name table is put into one layer, which both must name.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_emoe.hf.architecture import Architecture
from megatron_emoe.hf.pieces import Copy, Group, Piece
from tests import hf_models
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow

FAULTY = 1  # the layer with a fault in its table; layer 0 of DeepSeek and ERNIE is dense


@dataclass(frozen=True)
class Mutation:
    """A fault. first_layer: the first one it shows in, None for embedding and head. pieces: changes the table of that
    layer, or of embedding and head. flags: values to set; None leaves a flag out. model: options of the tiny model.
    constant: a name of megatron_emoe and its value. part: where it shows if not in a layer. refused: why the core
    cannot load it, or verify says before."""

    model_type: str
    first_layer: int | None = 0
    pieces: Callable[[list[Piece]], list[Piece]] | None = None
    flags: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    constant: tuple[str, Any] | None = None
    part: str | None = None
    refused: str | None = None


def swap(one: str, other: str) -> Callable[[list[Piece]], list[Piece]]:
    """Pieces whose Hugging Face names have `one` get what belongs to `other`, and the reverse."""

    def change(pieces: list[Piece]) -> list[Piece]:
        def swapped(name: str) -> str:
            here, there = (one, other) if one in name else (other, one)
            return name.replace(here, there)

        return [replace(p, hf=tuple((swapped(name), shape) for name, shape in p.hf)) for p in pieces]

    return change


@dataclass(frozen=True)
class Through(Copy):
    """The tensor after `function`."""

    function: Callable[[Tensor], Tensor]

    def pack(self, tensors, shape):
        return self.function(super().pack(tensors, shape))


def through(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[list[Piece]], list[Piece]]:
    """The Megatron tensor of this name is spoilt by `function`."""
    return lambda pieces: [replace(p, transform=Through(function)) if p.name == name else p for p in pieces]


@dataclass(frozen=True)
class NotInterleaved(Copy):
    """q, k and v one after the other, as some other libraries want them."""

    def pack(self, tensors, shape):
        return torch.cat(list(tensors))


def not_interleaved(pieces: list[Piece]) -> list[Piece]:
    return [replace(p, transform=NotInterleaved()) if "linear_qkv.weight" in p.name else p for p in pieces]


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def rope_first(tensor: Tensor) -> Tensor:
    return tensor.roll(8, dims=0)


SCORE_BIAS = {"score_bias": (40.0, 0.01)}
MUTATIONS = {
    "gate and up of experts swapped": Mutation("olmoe", FAULTY, swap("gate_proj", "up_proj")),
    "gate and up of shared experts swapped": Mutation(
        "qwen2_moe", FAULTY, swap("shared_expert.gate_proj", "shared_expert.up_proj")
    ),
    "gate and up of a dense layer swapped": Mutation("ernie4_5_moe", 0, swap("mlp.gate_proj", "mlp.up_proj")),
    "q and k swapped": Mutation("qwen2_moe", FAULTY, swap("q_proj", "k_proj")),
    "two experts swapped": Mutation("deepseek_v2", FAULTY, swap("experts.6.", "experts.7.")),
    "norms of a layer swapped": Mutation("deepseek_v2", FAULTY, swap("input_layernorm", "post_attention_layernorm")),
    "q and k norms swapped": Mutation("olmoe", FAULTY, swap("q_norm", "k_norm")),
    "qkv not interleaved": Mutation("ernie4_5_moe", FAULTY, not_interleaved),
    "rope rows before the latent": Mutation(
        "deepseek_v2", FAULTY, through("self_attention.linear_kv_down_proj.weight", rope_first)
    ),
    "selection bias rounded to bf16": Mutation(
        "ernie4_5_moe", FAULTY, through("mlp.router.expert_bias", rounded), model=SCORE_BIAS
    ),
    "embedding and head swapped": Mutation("olmoe", None, swap("lm_head", "model.embed_tokens"), part="embedding"),
    "final norm lost": Mutation(
        "ernie4_5_moe", None, through("decoder.final_layernorm.weight", torch.ones_like), part="head"
    ),
    "rope not interleaved": Mutation("ernie4_5_moe", 0, flags={"rotary_interleaved": None}),
    "another rope base": Mutation("qwen2_moe", 0, flags={"rotary_base": 10000}),
    "yarn without its factor": Mutation("deepseek_v2", 0, flags={"rotary_scaling_factor": 1.0}),
    "yarn without mscale": Mutation("deepseek_v2", 0, flags={"mscale": 1.0, "mscale_all_dim": 1.0}),
    "sigmoid for softmax": Mutation("ernie4_5_moe", 1, flags={"moe_router_score_function": "sigmoid"}),
    "no selection bias": Mutation(
        *("ernie4_5_moe", 1),
        flags={"moe_router_enable_expert_bias": None},
        model=SCORE_BIAS,
        refused="--moe-router-enable-expert-bias False: the checkpoint",
    ),
    "ERNIE not renormalised": Mutation("ernie4_5_moe", 1, flags={"moe_router_pre_softmax": True}),
    "softmax after the choice": Mutation("olmoe", 0, flags={"moe_router_pre_softmax": None}),
    "another scaling factor": Mutation("deepseek_v2", 1, flags={"moe_router_topk_scaling_factor": 1.001}),
    "no gate of the shared expert": Mutation("qwen2_moe", 0, flags={"moe_shared_expert_gate": None}),
    "no biases of q, k, v": Mutation("qwen2_moe", 0, flags={"add_qkv_bias": None}, refused="--add-qkv-bias False: "),
    "another epsilon in the norms": Mutation("qwen2_moe", 0, flags={"norm_epsilon": 1e-5}),
    "norms per head": Mutation("olmoe", 0, flags={"emoe_qk_norm": "core"}, refused="Global shape mismatch"),
    "no norms of q and k": Mutation(
        "olmoe", 0, flags={"qk_layernorm": None, "emoe_qk_norm": None}, refused="--qk-layernorm False: "
    ),
    "no clamp": Mutation("olmoe", 0, flags={"emoe_clip_qkv": None}, model={"clip_qkv": 1.5}),
    "another k": Mutation("deepseek_v2", 1, flags={"moe_router_topk": 3}),
    "k and v swapped": Mutation("llama", FAULTY, swap("k_proj", "v_proj")),
    "rotary scaling left out": Mutation("llama", 0, flags={"use_rope_scaling": None}),
    "rotary scaling by Megatron's default": Mutation("llama", 0, flags={"rope_scaling_factor": None}),
    "norms of each head swapped": Mutation("qwen3_moe", FAULTY, swap("q_norm", "k_norm")),
    "not renormalised": Mutation("qwen3_moe", 0, flags={"moe_router_pre_softmax": True}),
    "w1 and w3 swapped": Mutation("mixtral", FAULTY, swap(".w1", ".w3")),
    "softmax for sigmoid": Mutation("deepseek_v3", 1, flags={"moe_router_score_function": "softmax"}),
    "sigmoid's bias rounded to bf16": Mutation(
        "deepseek_v3", FAULTY, through("mlp.router.expert_bias", rounded), model={"score_bias": (40.0, 0.01)}
    ),
    "no scaling factor": Mutation("deepseek_v3", 1, flags={"moe_router_topk_scaling_factor": None}),
    "Granite's gate and up swapped": Mutation("granitemoe", FAULTY, swap("gate_proj", "up_proj")),
    "no embedding multiplier": Mutation("granitemoe", 0, flags={"mup_embedding_mult": 12.0}, part="embedding"),
    "another attention multiplier": Mutation("granitemoe", 0, flags={"mup_base_head_dim": None}),
    "the norms' own epsilon": Mutation("granitemoe", 0, flags={"norm_epsilon": 1e-2}, model={"rms_norm_eps": 1e-2}),
    "no scaling of logits": Mutation("granitemoe", None, flags={"mup_output_mult": 1.0}, part="head"),
    "the latent's epsilon that of the other norms": Mutation(
        "deepseek_v3", 0, constant=("megatron_emoe.model.attention.LATENT_EPSILON", 1e-5)
    ),
}


def spoilt(mutation: Mutation) -> Any:
    """Both patches of the architectures: name table and flags."""
    groups, flags = Architecture.groups, Architecture.flags

    def other_groups(self: Architecture, config: Any) -> list[Group]:
        if mutation.pieces is None:
            return groups(self, config)
        made = groups(self, config)
        where = [g for g in made if g.layer == mutation.first_layer]
        changed = iter(mutation.pieces([piece for group in where for piece in group.pieces]))
        return [
            replace(group, pieces=tuple(next(changed) for _ in group.pieces)) if group in where else group
            for group in made
        ]

    def other_flags(self: Architecture, config: Any) -> dict[str, Any]:
        made = {**flags(self, config), **(mutation.flags or {})}
        return {name: value for name, value in made.items() if value is not None}

    return mock.patch.multiple(Architecture, groups=other_groups, flags=other_flags)


def try_all(model_type: str, folder: Path) -> dict[str, tuple[str, str, list]]:
    """What the check says of each mutation, what the proof says, and the layers that its rows name.

    What does not depend on the mutation is done once: the Hugging Face model, and its answers in the proof.
    """
    from megatron_emoe.hf import verify

    cases = {name: mutation for name, mutation in MUTATIONS.items() if mutation.model_type == model_type}
    cases |= {"no fault": Mutation(model_type, model=next(iter(cases.values())).model)}
    models: dict[str, Path] = {}
    found = {}
    with mock.patch.object(verify, "_run_hf", once_per_folder(verify._run_hf)):
        for number, (name, mutation) in enumerate(cases.items()):
            options = {"num_hidden_layers": 2, **(mutation.model or {})}
            if repr(options) not in models:
                models[repr(options)] = hf_models.save(model_type, folder / f"hf{number}", **options)
            found[name] = try_one(mutation, models[repr(options)], folder / str(number))
    return found


def once_per_folder(run: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Path, Any] = {}

    def remembered(folder: Path, *others: Any) -> Any:
        if folder not in known:
            known[folder] = run(folder, *others)
        return known[folder]

    return remembered


def try_one(mutation: Mutation, hf: Path, out: Path) -> tuple[str, str, list]:
    from megatron_emoe.hf.import_model import import_model

    with spoilt(mutation):
        import_model(hf, out, report=str)
    with mock.patch(*mutation.constant) if mutation.constant else nullcontext():
        return compare(hf, out)


def compare(hf: Path, out: Path) -> tuple[str, str, list]:
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import verify

    check, proof, layers = "passed", "passed", []
    try:
        check_layers(hf, out / "release", report=str)
    except ValueError as error:
        check = str(error)
    try:
        report = verify(hf, out, tokens=hf_models.tokens(length=32), report=str)
        layers = [row.first_layer for row in report.rows]
        proof = "passed" if report.passed else report.table()
    except ValueError as error:  # the core refuses weights of another shape
        proof = f"refused: {error}"
    return check, proof, layers


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """All mutations of an architecture, tried once, on one rank."""
    done: dict[str, dict] = {}

    def get(model_type: str) -> dict:
        if model_type not in done:
            done[model_type] = run_ranks(try_all, 1, model_type, tmp_path_factory.mktemp(model_type))[0]
        return done[model_type]

    return get


@pytest.mark.parametrize("name", sorted(MUTATIONS, key=lambda name: MUTATIONS[name].model_type))
def test_the_check_of_layers_finds_the_fault_and_its_layer(tried, name):
    mutation = MUTATIONS[name]
    check, _, _ = tried(mutation.model_type)[name]
    expected = f"layer {mutation.first_layer}" if mutation.part is None else mutation.part
    assert check.split(":")[0].split(" at k")[0] == expected, check


@pytest.mark.parametrize("name", sorted(MUTATIONS, key=lambda name: MUTATIONS[name].model_type))
def test_the_proof_of_the_whole_fails_and_names_the_layer(tried, name):
    mutation = MUTATIONS[name]
    _, proof, layers = tried(mutation.model_type)[name]
    if mutation.refused:
        assert proof.startswith("refused: ") and mutation.refused in proof
        return
    assert proof.endswith("fp32: NOT the same model"), proof
    shown = {"embedding": 0, "head": None}.get(mutation.part, mutation.first_layer)
    assert layers == [shown]


@pytest.mark.parametrize("model_type", [*hf_models.MODEL_TYPES, *hf_models.LATER_TYPES])
def test_without_a_fault_both_pass(tried, model_type):
    assert tried(model_type)["no fault"] == ("passed", "passed", [None])
