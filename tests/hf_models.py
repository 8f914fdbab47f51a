"""Tiny random transformers models of the supported architectures, in memory and as folders on disk.

No tensor keeps its initial value: transformers starts norms at one and biases at zero, where a wrong name or a lost
tensor changes nothing. Weights are scaled so that activations, router scores and logits are of order one, as in a
trained model; a router at its usual start is so indifferent that rounding decides which experts a token gets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
}
MODEL_TYPES = ("olmoe", "qwen2_moe", "deepseek_v2", "ernie4_5_moe")
"""Those that every test of conversion is run on."""
LATER_TYPES = ("llama", "qwen3_moe", "mixtral", "deepseek_v3", "granitemoe")
"""Those of which most parts are a model's above: hf/test_later_models.py has what is theirs."""

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000,
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
"""DeepSeek-V2-Lite's position embedding."""

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""LLaMA 3.2's. With heads of width 8 one of four frequencies is left, one smoothed, one divided by the factor."""

_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    },
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "deepseek_v2": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "max_position_embeddings": 163840,
        "rope_parameters": YARN,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3,
    },
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "mixtral": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "deepseek_v3": {
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000},
    },
    "granitemoe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    },
}
_RENAMED = {  # what the other architectures call a setting
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "ernie4_5_moe": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "deepseek_v3": {"num_experts": "n_routed_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "granitemoe": {"num_experts": "num_local_experts"},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2, "clip_qkv": 0.7, "tied": True},
    "qwen2_moe": {"num_experts": 10, "num_experts_per_tok": 4, "num_key_value_heads": 1, "tied": True},
    "deepseek_v2": {"num_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0, "tied": True},
    "ernie4_5_moe": {"num_experts": 10, "num_experts_per_tok": 6, "num_key_value_heads": 4, "tied": False},
    "llama": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "tied": True,
    },
    "qwen3_moe": {"num_experts": 10, "num_experts_per_tok": 4, "num_key_value_heads": 1, "tied": True},
    "mixtral": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "tied": True},
    "deepseek_v3": {"num_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0, "tied": True},
    "granitemoe": {"num_experts": 6, "num_experts_per_tok": 3, "residual_multiplier": 1.5, "tied": True},
}
"""A second model of each architecture: uneven numbers of experts, grouped queries, clamps, the other tying."""


def config(model_type: str, *, tied: bool | None = None, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration. changes: of fields; num_experts and num_experts_per_tok work for every architecture."""
    names = _RENAMED.get(model_type, {})
    settings = _COMMON | _SHAPES[model_type] | {names.get(name, name): value for name, value in changes.items()}
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    return CLASSES[model_type][0](**settings)


def build(
    model_type: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    score_bias: tuple[float, float] | None = None,
    router_scale: float = 1.5,
    **config_changes: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode, on the CPU, with transformers' plain (eager) attention and experts.

    tied: whether the head is the embedding; None: the architecture's default (ERNIE: tied). score_bias: offset and
    spread (standard deviation) of the selection bias, fp32; None: (40, 0.08), for DeepSeek-V3 (0.1, 0.08). On the
    released ERNIE of 21B the offset is 22 to 63 and the spread is of the order of one expert's mean score, here 1/8.
    router_scale: standard deviation of router logits.
    """
    made = config(model_type, tied=tied, **config_changes)
    made._attn_implementation = "eager"
    made._experts_implementation = "eager"
    model = CLASSES[model_type][1](made).eval()
    generator = torch.Generator().manual_seed(seed)
    score_bias = score_bias or ((0.1, 0.08) if model_type == "deepseek_v3" else (40.0, 0.08))
    with torch.no_grad():
        for name, tensor in _parameters(model):
            _randomise(name, tensor, generator, score_bias, router_scale)
            if model_type == "deepseek_v2" and name.endswith("q_proj.weight"):
                tensor /= (
                    1.59  # YaRN's factor in the softmax's scale: else rounding errors grow to 1e-5 in a few layers
                )
    return _cast(model, dtype)


def save(
    model_type: str,
    folder: str | Path,
    *,
    max_shard_size: str | int | None = None,
    save_original_format: bool = True,
    tokenizer: bool = False,
    mtp: bool = False,
    **build_options: Any,
) -> Path:
    """Write build(model_type, **build_options) to `folder` as transformers does, and return the folder.

    max_shard_size: such as "40KB", for several files. save_original_format: False keeps transformers' fused experts.
    tokenizer: add a small one, with as many words as the model has rows. mtp: add ERNIE's multi-token-prediction
    tensors, which transformers ignores (needs a single file).
    """
    folder = Path(folder)
    model = build(model_type, **build_options)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, save_original_format=save_original_format, **sharding)
    if tokenizer:
        _save_tokenizer(folder, model.config.vocab_size)
    if mtp:
        _add_mtp(folder, model.config, build_options.get("seed", 0))
    return folder


def tokens(vocab_size: int = 128, *, batch: int = 2, length: int = 24, seed: int = 1) -> Tensor:
    """Random token ids, int64 [batch, length]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def _parameters(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter once: a tied head is the embedding. DeepSeek-V3's selection bias is a buffer."""
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return sorted([*model.named_parameters(remove_duplicate=True), *biases])


def _randomise(
    name: str, tensor: Tensor, generator: torch.Generator, score_bias: tuple[float, float], router_scale: float
) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        tensor.copy_(score_bias[0] + score_bias[1] * noise)
    elif "norm" in name:
        tensor.copy_(1 + 0.25 * noise)
    elif name.endswith("bias"):
        tensor.copy_(0.5 * noise)
    elif "embed_tokens" in name:
        tensor.copy_(0.3 * noise)  # as a tied head it must not make logits of order ten
    else:
        scale = router_scale if name.endswith(("mlp.gate.weight", "router.weight")) else 1.0
        tensor.copy_(scale * noise / tensor.shape[-1] ** 0.5)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """To `dtype`, except what the architecture keeps in fp32 (ERNIE's router), as from_pretrained does."""
    kept = tuple(model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.named_parameters():
        tensor.data = tensor.data.to(torch.float32 if any(part in name for part in kept) else dtype)
    model.config.dtype = dtype
    return model


def break_expert(folder: Path, copy: Path) -> Path:
    """A copy of a saved model in which one number of one expert of the second layer is NaN; returns its folder."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.mlp.experts.3.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    return copy


def _save_tokenizer(folder: Path, size: int) -> None:
    """A word-level tokenizer: `w7` is token 7, between the four special tokens and the last row of the embedding."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(len(special), size)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def _add_mtp(folder: Path, made: PreTrainedConfig, seed: int) -> None:
    """One dense block with its norms and the projection of [embedding; hidden state], named as on ERNIE's disk."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(seed + 1000)
    dtype = tensors["model.embed_tokens.weight"].dtype
    for name, shape in _mtp_shapes(made).items():
        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | {"num_nextn_predict_layers": 1}, indent=2))


def _mtp_shapes(made: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    hidden, ffn = made.hidden_size, made.intermediate_size
    head = hidden // made.num_attention_heads
    block = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (made.num_key_value_heads * head, hidden),
        "self_attn.v_proj": (made.num_key_value_heads * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes = {f"model.mtp_block.0.{name}.weight": shape for name, shape in block.items()}
    shapes |= {f"model.mtp_{name}_norm.0.weight": (hidden,) for name in ("emb", "hidden")}
    return shapes | {"model.mtp_linear_proj.0.weight": (hidden, 2 * hidden)}
