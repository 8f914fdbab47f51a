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
from transformers import PreTrainedConfig, PreTrainedModel

from tests.hf_shapes import CLASSES, COMMON, RENAMED, SHAPES
from tests.hf_shapes import LATER_TYPES as LATER_TYPES
from tests.hf_shapes import LLAMA3 as LLAMA3
from tests.hf_shapes import MODEL_TYPES as MODEL_TYPES
from tests.hf_shapes import VARIANTS as VARIANTS
from tests.hf_shapes import YARN as YARN


def config(model_type: str, *, tied: bool | None = None, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration. changes: of fields; num_experts and num_experts_per_tok work for every architecture."""
    names = RENAMED.get(model_type, {})
    settings = COMMON | SHAPES[model_type] | {names.get(name, name): value for name, value in changes.items()}
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
