"""The attention of OLMoE and DeepSeek-V2-Lite in our spec against transformers' own classes: outputs and gradients.

The reference runs in this process, ours on one rank or on two tensor-parallel ranks with sequence parallelism, from
the same weights. The weights are brought into Megatron's layout row by row, by code of this file alone.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding
from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.olmo.modeling_olmo import OlmoAttention
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeRMSNorm, OlmoeRotaryEmbedding

from tests.distributed import run_ranks
from tests.tiny import start

HIDDEN, HEADS, LENGTH, BATCH = 32, 4, 6, 2
HEAD = HIDDEN // HEADS
LATENT = {"kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 12}
YARN = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
# The dimension over which tensor-parallel ranks share a weight; norms are whole on every rank.
SHARDED = {
    "linear_qkv": 0,
    "linear_proj": 1,
    "linear_q_proj": 0,
    "linear_q_down_proj": 0,
    "linear_q_up_proj": 0,
    "linear_kv_down_proj": 0,
    "linear_kv_up_proj": 0,
}


class Case(NamedTuple):
    """One attention: fields of our configuration, weights in Megatron's layout, an input [S, B, H], the gradient of the
    output, and what transformers computes of them: output, and gradients by name ("input" for the input)."""

    settings: dict[str, Any]
    weights: dict[str, Tensor]
    hidden: Tensor
    cotangent: Tensor
    output: Tensor
    gradients: dict[str, Tensor]


def randomise(module: nn.Module) -> nn.Module:
    """Weights with a spread; norms that are not all ones."""
    generator = torch.Generator().manual_seed(3)
    for weight in module.parameters():
        values = torch.randn(weight.shape, generator=generator)
        weight.data.copy_(1 + values / 4 if weight.dim() == 1 else values / 4)
    return module


def causal_mask() -> Tensor:
    """What transformers adds to the scores, [1, 1, S, S]."""
    return torch.full((LENGTH, LENGTH), float("-inf")).triu(1)[None, None]


def case_of(settings: dict[str, Any], attention: nn.Module, positions: Any, pack: Any) -> Case:
    """Run transformers' attention, in its own layout [B, S, H]. pack: its tensors by name, in Megatron's layout."""
    generator = torch.Generator().manual_seed(4)
    hidden, cotangent = (torch.randn(BATCH, LENGTH, HIDDEN, generator=generator) for _ in range(2))
    hidden.requires_grad_()
    output, _ = attention(
        hidden_states=hidden * 1.0, position_embeddings=positions(hidden), attention_mask=causal_mask()
    )
    output.backward(cotangent)
    weights = pack({name: weight.detach() for name, weight in attention.named_parameters()})
    gradients = pack({name: weight.grad for name, weight in attention.named_parameters()})
    gradients["input"] = hidden.grad.transpose(0, 1)
    ours = [tensor.detach().transpose(0, 1).contiguous() for tensor in (hidden, cotangent, output)]
    return Case(settings, weights, *ours, gradients)


def pack_qkv(groups: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """For every query group: its queries' rows, its key's, its value's."""
    rows: list[Tensor] = []
    for group in range(groups):
        for head in range(group * HEADS // groups, (group + 1) * HEADS // groups):
            rows += tensors["q_proj.weight"][head * HEAD : (head + 1) * HEAD]
        for kind in ("k_proj.weight", "v_proj.weight"):
            rows += tensors[kind][group * HEAD : (group + 1) * HEAD]
    packed = {"linear_qkv.weight": torch.stack(rows), "linear_proj.weight": tensors["o_proj.weight"]}
    for kind in "qk":
        if f"{kind}_norm.weight" in tensors:
            packed[f"{kind}_layernorm.weight"] = tensors[f"{kind}_norm.weight"]
    return packed


def olmoe(groups: int, clip: float | None) -> Case:
    """Full-width norm, with or without the clamp."""
    config = OlmoeConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=groups,
        clip_qkv=clip,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation="eager",
    )
    settings = {
        "num_query_groups": groups,
        "qk_layernorm": True,
        "emoe_qk_norm": "full",
        "emoe_clip_qkv": clip,
        "layernorm_epsilon": 1e-3,
    }
    rotary = OlmoeRotaryEmbedding(config)
    attention = randomise(OlmoeAttention(config, 0))
    return case_of(settings, attention, lambda x: rotary(x, positions()), lambda tensors: pack_qkv(groups, tensors))


def olmo(clip: float) -> Case:
    """The clamp without a norm: the first OLMo."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    common = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "clip_qkv": clip, "rope_parameters": rope}
    config = OlmoConfig(**common, attn_implementation="eager")
    rotary = OlmoeRotaryEmbedding(OlmoeConfig(**common))
    attention = randomise(OlmoAttention(config, 0))
    return case_of(
        {"emoe_clip_qkv": clip}, attention, lambda x: rotary(x, positions()), lambda tensors: pack_qkv(HEADS, tensors)
    )


def positions() -> Tensor:
    return torch.arange(LENGTH)[None].expand(BATCH, -1)


def deepseek(rope: dict[str, Any], q_lora_rank: int | None = None) -> Case:
    """Multi-latent attention; only compressed queries have a norm."""
    config = DeepseekV2Config(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=LATENT["kv_lora_rank"],
        qk_nope_head_dim=LATENT["qk_head_dim"],
        qk_rope_head_dim=LATENT["qk_pos_emb_head_dim"],
        v_head_dim=LATENT["v_head_dim"],
        rope_parameters=rope | {"rope_theta": 10000.0, "original_max_position_embeddings": 4096},
        attn_implementation="eager",
    )
    yarn = rope["rope_type"] == "yarn"
    settings = LATENT | {
        "qk_layernorm": True,
        "emoe_qk_norm": "core" if q_lora_rank else "latent",
        "q_lora_rank": q_lora_rank,
        "multi_latent_attention": True,
        "rope_type": "yarn" if yarn else "rope",
        "layernorm_epsilon": 1e-6,
        "mscale": rope.get("mscale", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim", 0.0),
        "rotary_scaling_factor": rope.get("factor", 1.0),
    }
    names = {
        "q_proj": "linear_q_proj",
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }

    def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{names[name.partition('.')[0]]}.weight": tensor for name, tensor in tensors.items()}

    rotary = DeepseekV2RotaryEmbedding(config)
    return case_of(settings, randomise(DeepseekV2Attention(config, 0)), lambda x: rotary(x, positions()), pack)


CASES = {
    "OLMoE": lambda: olmoe(groups=4, clip=None),
    "OLMoE clamped, two query groups": lambda: olmoe(groups=2, clip=0.8),
    "OLMoE, one query group": lambda: olmoe(groups=1, clip=None),
    "OLMo clamped, no norm": lambda: olmo(clip=0.5),
    "DeepSeek-V2-Lite": lambda: deepseek(YARN),
    "DeepSeek-V2-Lite, plain rotary": lambda: deepseek({"rope_type": "default"}),
    "DeepSeek-V2": lambda: deepseek(YARN, q_lora_rank=8),
}


class Ours(NamedTuple):
    """What one rank computed: its part of the sequence of the output, and of each gradient."""

    output: Tensor
    gradients: dict[str, Tensor]


def part(tensor: Tensor, dim: int) -> Tensor:
    """This tensor-parallel rank's part of a whole tensor."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return tensor.chunk(ranks, dim)[parallel_state.get_tensor_model_parallel_rank()]


def attention_config(settings: dict[str, Any], ranks: int) -> Any:
    from megatron_emoe.routing.transformer_config import ElasticMLATransformerConfig, ElasticTransformerConfig

    kind = ElasticMLATransformerConfig if settings.get("multi_latent_attention") else ElasticTransformerConfig
    common = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_moe_experts": 8,
        "moe_router_topk": 2,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "use_cpu_initialization": True,
        "tensor_model_parallel_size": ranks,
        "sequence_parallel": ranks > 1,
    }
    return kind(**common | settings)


def build(settings: dict[str, Any], ranks: int) -> nn.Module:
    """The attention of a layer of our local spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    from megatron_emoe.model.layer_spec import our_layer

    start(tensor_model_parallel_size=ranks)
    config = attention_config(settings, ranks)
    spec = get_gpt_layer_local_spec(
        8,
        False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization="RMSNorm",
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    attention = our_layer(spec, config).submodules.self_attention
    return build_module(attention, config=config, layer_number=1, pg_collection=groups)


class Chunk(nn.Module):
    """A model chunk as the core's reduction of gradients sees one."""

    def __init__(self, attention: nn.Module) -> None:
        from types import SimpleNamespace

        super().__init__()
        self.self_attention, self.ddp_config = attention, SimpleNamespace(use_megatron_fsdp=False)


def compute(case: Case, ranks: int) -> Ours:
    """Output and gradients on this rank, after the core's own reduction of gradients over tensor-parallel ranks."""
    from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    attention = build(case.settings, ranks)
    weights = dict(attention.named_parameters())
    assert weights.keys() == case.weights.keys()
    for name, weight in weights.items():
        whole, dim = case.weights[name], SHARDED.get(name.split(".")[0])
        weight.data.copy_(whole if dim is None else part(whole, dim))
    rotary = {}
    if not attention.config.multi_latent_attention:
        rotary["rotary_pos_emb"] = RotaryEmbedding(HEAD, rotary_percent=1.0)(LENGTH)
    hidden = part(case.hidden, 0).clone().requires_grad_()
    mask = torch.ones(1, 1, LENGTH, LENGTH).triu(1) > 0
    output, _ = attention(hidden * 1.0, attention_mask=mask, **rotary)
    output.backward(part(case.cotangent, 0))
    _allreduce_non_tensor_model_parallel_grads([Chunk(attention)], attention.config)
    gradients = {name: weight.grad for name, weight in weights.items()}
    return Ours(output.detach(), gradients | {"input": hidden.grad})


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_transformers(name, ranks):
    case = CASES[name]()
    results = run_ranks(compute, ranks, case, ranks)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.cat([each.output for each in results]), case.output, **close)
    assert all(each.gradients.keys() == case.gradients.keys() for each in results)
    for key, expected in case.gradients.items():
        parts = [each.gradients[key] for each in results]
        dim = 0 if key == "input" else SHARDED.get(key.split(".")[0])
        wholes = parts if dim is None else [torch.cat(parts, dim)]
        for whole in wholes:
            torch.testing.assert_close(whole, expected, **close, msg=lambda text, key=key: f"{key}: {text}")


def test_the_clamp_and_the_norm_of_these_cases_matter():
    clamped, free = olmoe(groups=2, clip=0.8), olmoe(groups=2, clip=None)
    assert (clamped.output - free.output).abs().max() > 0.05
    assert max(gradient.abs().max() for gradient in free.gradients.values()) > 0.05
    assert free.gradients["k_layernorm.weight"].abs().max() > 0.05


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """A norm of 16 queries in bfloat16."""
    from megatron_emoe.model.attention import FullWidthQueryNorm
    from megatron_emoe.routing.transformer_config import ElasticTransformerConfig

    start()
    config = ElasticTransformerConfig(
        num_layers=1, hidden_size=256, num_attention_heads=16, num_moe_experts=2, params_dtype=torch.bfloat16
    )
    norm = FullWidthQueryNorm(hidden_size=16, config=config, eps=1e-5)
    assert norm.weight.dtype == torch.bfloat16
    norm.weight.data.copy_(weight)
    return norm(x).detach()


def test_in_bfloat16_the_norm_is_bit_for_bit_that_of_transformers():
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(64, 2, 16, 16, generator=generator) * 3).bfloat16()
    theirs = OlmoeRMSNorm(256, eps=1e-5).bfloat16()
    theirs.weight.data.copy_(1 + torch.randn(256, generator=generator) / 4)
    expected = theirs(x.flatten(2)).view_as(x).detach()
    assert torch.equal(run_ranks(normed, 1, x, theirs.weight.detach())[0], expected)
