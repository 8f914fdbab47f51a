"""Every refusal of --emoe-qk-norm and --emoe-clip-qkv, word for word, and what they accept."""

import contextlib
import dataclasses
import io
import re
from typing import Any

import pytest

from megatron_emoe.routing.transformer_config import (
    ElasticMLATransformerConfig,
    ElasticTransformerConfig,
    check_elastic,
)
from tests.distributed import run_ranks
from tests.routing.test_transformer_config import MODEL as PLAIN
from tests.tiny import arguments, flags

MODEL = PLAIN | {"normalization": "RMSNorm"}
FULL = {"emoe_qk_norm": "full", "qk_layernorm": True}
LATENT = {"emoe_qk_norm": "latent", "qk_layernorm": True, "multi_latent_attention": True, "q_lora_rank": None}
CLIP = {"emoe_clip_qkv": 8.0}
BY_ITSELF = {
    "plain": {},
    "full": FULL,
    "full and clip": FULL | CLIP,
    "clip without a norm": CLIP,
    "clip with the core's norm": CLIP | {"qk_layernorm": True},
    "latent": LATENT,
    "latent attention of the core with compressed queries": LATENT | {"emoe_qk_norm": "core", "q_lora_rank": 8},
    "latent attention without norms": LATENT | {"emoe_qk_norm": "core", "qk_layernorm": False},
    "the core's norm of the queries' input, which Transformer Engine has": LATENT
    | {"emoe_qk_norm": "core", "transformer_impl": "transformer_engine"},
    "full, Transformer Engine": FULL | CLIP | {"transformer_impl": "transformer_engine"},
    "latent, Transformer Engine": LATENT | {"transformer_impl": "transformer_engine"},
}


def checked(settings: dict[str, Any]) -> None:
    """Check settings on top of a valid configuration: the core's own checks of some of them are not ours to pass."""
    kind = ElasticMLATransformerConfig if settings.get("multi_latent_attention") else ElasticTransformerConfig
    plain = {"qk_layernorm": False} if kind is ElasticMLATransformerConfig else {}
    check_elastic(set_all(kind(**MODEL | plain), {"transformer_impl": "local"} | settings))


def set_all(config: Any, settings: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    assert settings.keys() <= names, settings.keys() - names  # a misspelt one would make a test that cannot fail
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("settings", BY_ITSELF.values(), ids=BY_ITSELF)
def test_what_they_accept(settings):
    checked(settings)


REFUSED = [
    (FULL | {"qk_layernorm": False}, "--emoe-qk-norm full: needs --qk-layernorm, which is not given"),
    (LATENT | {"qk_layernorm": False}, "--emoe-qk-norm latent: needs --qk-layernorm, which is not given"),
    (
        LATENT | {"emoe_qk_norm": "full"},
        "--emoe-qk-norm full cannot be combined with --multi-latent-attention: "
        "it has no queries and keys of the model's width",
    ),
    (
        FULL | {"normalization": "LayerNorm"},
        "--emoe-qk-norm full: needs --normalization RMSNorm, not LayerNorm",
    ),
    (
        FULL | {"layernorm_zero_centered_gamma": True},
        "--emoe-qk-norm full cannot be combined with --apply-layernorm-1p: "
        "its weight is the factor itself, not factor - 1",
    ),
    (
        {"emoe_qk_norm": "latent", "qk_layernorm": True},
        "--emoe-qk-norm latent: needs --multi-latent-attention, which is not given",
    ),
    (
        LATENT | {"q_lora_rank": 8},
        "--emoe-qk-norm latent cannot be combined with --q-lora-rank 8: compressed queries have a norm; use core",
    ),
    (
        LATENT | {"emoe_qk_norm": "core"},
        "--qk-layernorm with --multi-latent-attention and no --q-lora-rank: the local implementation has no norm "
        "before the queries' projection; for DeepSeek-V2-Lite's model give --emoe-qk-norm latent",
    ),
    ({"emoe_clip_qkv": 0.0}, "--emoe-clip-qkv 0.0: must be a finite number above 0"),
    ({"emoe_clip_qkv": -1.0}, "--emoe-clip-qkv -1.0: must be a finite number above 0"),
    ({"emoe_clip_qkv": float("inf")}, "--emoe-clip-qkv inf: must be a finite number above 0"),
    ({"emoe_clip_qkv": float("nan")}, "--emoe-clip-qkv nan: must be a finite number above 0"),
    (
        LATENT | CLIP,
        "--emoe-clip-qkv 8.0 cannot be combined with --multi-latent-attention: "
        "its keys and values are expanded after the clamp's place",
    ),
]


def refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        checked(settings)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_they_refuse(settings, message):
    refused(settings, message)


AROUND = [
    (
        {"transformer_impl": "inference_optimized"},
        "--transformer-impl inference_optimized: its layers are fused for the core's own attention",
    ),
    ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant dsa: it is another attention"),
    ({"qk_l2_norm": True}, "--qk-l2-norm: it is another norm of queries and keys"),
    (
        {"fused_single_qkv_rope": True},
        "fused_single_qkv_rope: rotary embedding comes before queries and keys are split",
    ),
]


@pytest.mark.parametrize(("feature", "rest"), AROUND, ids=[next(iter(feature)) for feature, _ in AROUND])
@pytest.mark.parametrize(
    ("settings", "cause"),
    [(FULL, "--emoe-qk-norm full"), (LATENT, "--emoe-qk-norm latent"), (CLIP, "--emoe-clip-qkv 8.0")],
    ids=["full", "latent", "clip"],
)
def test_kinds_of_attention_that_go_around_them(settings, cause, feature, rest):
    refused(settings | feature, f"{cause} cannot be combined with {rest}")
    if feature != {"transformer_impl": "inference_optimized"}:
        off = {"emoe_qk_norm": "core", "emoe_clip_qkv": None, "qk_layernorm": False}
        checked(settings | off | feature)


def test_the_fused_compression_is_another_class():
    refused(
        LATENT | {"mla_down_proj_fusion": True},
        "--emoe-qk-norm latent cannot be combined with --mla-down-proj-fusion: it is another attention class of the "
        "core",
    )
    checked(LATENT | {"mla_down_proj_fusion": True, "emoe_qk_norm": "core", "qk_layernorm": False})


def command_line(changes: dict[str, Any]) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as leave:
        arguments(flags(**changes))
    return leave.value.code, text.getvalue()


def test_a_command_line_is_refused_in_one_line():
    status, text = run_ranks(command_line, 1, {"emoe_qk_norm": "full"})[0]
    errors = [line for line in text.splitlines() if "error:" in line]
    assert (status, len(errors)) == (2, 1)
    assert errors[0].endswith("error: --emoe-qk-norm full: needs --qk-layernorm, which is not given")
