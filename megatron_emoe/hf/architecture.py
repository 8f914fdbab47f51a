"""What all architectures have in common: from a config.json to Megatron's flags and to the name table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor
from transformers import PretrainedConfig

from megatron_emoe.hf.fused_experts import joined
from megatron_emoe.hf.pieces import Group, Layout, PackQKV, Piece, gated, linear

Flags = dict[str, Any]
"""Megatron's arguments by name (underscores); True is a switch."""


class Architecture(ABC):
    """One Hugging Face architecture: its flags and its name table, both from the same configuration.

    Subclasses say what is special; the order of the methods is that of a forward pass.
    """

    model_type: ClassVar[str]
    k_key: ClassVar[str] = "num_experts_per_tok"
    """The name of k in config.json. (In memory transformers lets every architecture say num_experts_per_tok.)"""
    carried: ClassVar[tuple[str, ...]] = ()
    """Prefixes of tensors that this package does not train: kept on import, written back on export."""
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    balancing_key: ClassVar[str] = "router_aux_loss_coef"
    """The name of the load-balancing loss's weight in config.json."""
    moe_block: ClassVar[str] = "mlp"
    """The name of a layer's experts and router, as published models have it on disk."""
    expert_matrices: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    fused: ClassVar[tuple[str, str] | None] = None
    """Names of the two tensors in which files hold all experts of a layer (fused_experts.py); None: one by one."""
    dense: ClassVar[bool] = False
    """Whether no layer has experts, so that there is no k either."""

    @abstractmethod
    def refuse(self, config: PretrainedConfig) -> None:
        """ValueError, by the config's own key, for what cannot be expressed exactly."""

    @abstractmethod
    def own_flags(self, config: PretrainedConfig) -> Flags:
        """The flags that only this architecture needs."""

    @abstractmethod
    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        """Attention of a layer, with the norm before it."""

    def shared_experts(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        """Shared experts of a MoE layer, with their gate; by default there are none."""
        return []

    def on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the names of the table, as files of this architecture have them. Layers must be whole."""
        return tensors if self.fused is None else joined(tensors, self.fused)

    def stream_scale(self, config: PretrainedConfig) -> float:
        """transformers' hidden states between the layers over Megatron's."""
        return 1.0

    def is_moe(self, config: PretrainedConfig, layer: int) -> bool:
        """Whether a layer (0-based) has experts."""
        return not self.dense

    def router(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        """Router of a MoE layer, with its selection bias."""
        shape = (experts_in(config), config.hidden_size)
        return [linear("mlp.router.weight", f"{_prefix(layer)}.{self.moe_block}.gate.weight", shape, layer)]

    def expert_width(self, config: PretrainedConfig) -> int:
        return config.moe_intermediate_size

    def check(self, config: PretrainedConfig) -> None:
        """Refuse what this package, or Megatron-Core, cannot compute exactly.

        Raises:
            ValueError: key, value and rule.
        """
        if config.hidden_act != "silu":
            raise ValueError(f"hidden_act {config.hidden_act!r}: only 'silu' (SwiGLU) is supported")
        rope = config.rope_parameters
        if rope["rope_type"] not in self.rope_types:
            raise ValueError(
                f"rope_type {rope['rope_type']!r} (rope_scaling): {self.model_type} is supported with "
                f"{' or '.join(map(repr, self.rope_types))}"
            )
        if rope["rope_theta"] != int(rope["rope_theta"]):
            raise ValueError(
                f"rope_theta {rope['rope_theta']}: must be a whole number, Megatron's --rotary-base is one"
            )
        self.refuse(config)
        if self.dense:
            return
        experts = experts_in(config)
        if not 1 <= config.num_experts_per_tok <= experts:
            raise ValueError(f"{self.k_key} {config.num_experts_per_tok}: must lie in [1, {experts}]")
        if not any(self.is_moe(config, layer) for layer in range(config.num_hidden_layers)):
            raise ValueError(f"num_hidden_layers {config.num_hidden_layers}: no layer has experts: a dense model")

    def flags(self, config: PretrainedConfig) -> Flags:
        """Megatron's flags for exactly this model. How to run it (parallelism, kernels, data) is not among them."""
        dtype = str(config.dtype).removeprefix("torch.")
        heads = config.num_attention_heads
        return {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": heads,
            **self.group_query(config),
            "max_position_embeddings": config.max_position_embeddings,
            "position_embedding_type": "rope",
            "rotary_base": int(config.rope_parameters["rope_theta"]),
            "normalization": "RMSNorm",
            "norm_epsilon": config.rms_norm_eps,
            "swiglu": True,
            "disable_bias_linear": True,
            "attention_dropout": getattr(config, "attention_dropout", 0.0),
            "hidden_dropout": 0.0,
            "vocab_size": config.vocab_size,
            **({} if config.tie_word_embeddings else {"untie_embeddings_and_output_weights": True}),
            **({} if self.dense else self._expert_flags(config)),
            **self.own_flags(config),
            **({"bf16": True} if dtype == "bfloat16" else {"fp16": True} if dtype == "float16" else {}),
        }

    def _expert_flags(self, config: PretrainedConfig) -> Flags:
        return {
            "num_experts": experts_in(config),
            "moe_router_topk": config.num_experts_per_tok,
            "moe_ffn_hidden_size": self.expert_width(config),
            "moe_router_dtype": "fp32",
            **self.layer_frequency(config),
        }

    def balancing(self, config: PretrainedConfig) -> Flags:
        """The flags of training that balance experts as config.json, completed by transformers, has it; none at 0.

        transformers averages its loss over the L layers with experts and counts all k choices, Megatron sums over
        layers and divides by k: alpha of the one is alpha k / L of the other (docs/checkpoints.md).
        """
        alpha = getattr(config, self.balancing_key, None)
        if not alpha:
            return {}
        layers = sum(self.is_moe(config, layer) for layer in range(config.num_hidden_layers))
        converted = alpha * config.num_experts_per_tok / layers
        return {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": float(f"{converted:.4g}")}

    def group_query(self, config: PretrainedConfig) -> Flags:
        """Grouped queries, and the width of a head where it is not hidden size / heads."""
        flags: Flags = {}
        if config.num_key_value_heads != config.num_attention_heads:
            flags = {"group_query_attention": True, "num_query_groups": config.num_key_value_heads}
        if head_dim(config) != config.hidden_size // config.num_attention_heads:
            flags["kv_channels"] = head_dim(config)
        return flags

    def layer_frequency(self, config: PretrainedConfig) -> Flags:
        """--moe-layer-freq where some layers are dense. (Where none is, Megatron's default stacks all layers.)"""
        kinds = [int(self.is_moe(config, layer)) for layer in range(config.num_hidden_layers)]
        if all(kinds) or self.dense:
            return {}
        first = kinds.index(1)
        if all(kinds[first:]):
            return {"moe_layer_freq": f"([0]*{first}+[1]*{len(kinds) - first})"}
        return {"moe_layer_freq": f"([{','.join(map(str, kinds))}])"}

    def layout(self, config: PretrainedConfig, *, stacked: bool | None = None) -> Layout:
        """Layout of the checkpoint that these flags lead to, or of one that stacks its layers as told."""
        if stacked is None:
            stacked = not self.layer_frequency(config)
        return Layout(stacked, config.num_hidden_layers, experts_in(config))

    def groups(self, config: PretrainedConfig) -> list[Group]:
        """The whole name table: embedding, layers, head."""
        vocabulary = (config.vocab_size, config.hidden_size)
        embedding = linear("embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary)
        head = [linear("decoder.final_layernorm.weight", "model.norm.weight", (config.hidden_size,))]
        if not config.tie_word_embeddings:
            head.append(linear("output_layer.weight", "lm_head.weight", vocabulary))
        layers = [Group(f"layer {n}", tuple(self.layer(config, n)), layer=n) for n in range(config.num_hidden_layers)]
        return [Group("embedding", (embedding,)), *layers, Group("head", tuple(head))]

    def layer(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        """One decoder layer."""
        return [*self.attention(config, layer), *self._mlp(config, layer)]

    def _mlp(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        hf, hidden = f"{_prefix(layer)}.mlp", config.hidden_size
        norm = f"{_prefix(layer)}.post_attention_layernorm.weight"
        if not self.is_moe(config, layer):
            before = linear("mlp.linear_fc1.layer_norm_weight", norm, (hidden,), layer)
            return [before, *gated("mlp", hf, config.intermediate_size, hidden, layer)]
        pieces = [linear("pre_mlp_layernorm.weight", norm, (hidden,), layer), *self.router(config, layer)]
        experts, called = f"{_prefix(layer)}.{self.moe_block}.experts", self.expert_matrices
        for expert in range(experts_in(config)):
            width = self.expert_width(config)
            pieces += gated("mlp.experts.experts", f"{experts}.{expert}", width, hidden, layer, expert, called=called)
        return pieces + self.shared_experts(config, layer)


def self_attention(config: PretrainedConfig, layer: int, *, bias: bool = False) -> list[Piece]:
    """Attention with separate q, k, v projections and the norm before it. bias: q, k and v have one."""
    hidden, width = config.hidden_size, head_dim(config)
    groups = config.num_key_value_heads
    hf = f"{_prefix(layer)}.self_attn"
    rows = {"q": config.num_attention_heads * width, "k": groups * width, "v": groups * width}
    packed = sum(rows.values())

    def qkv(kind: str, *columns: int) -> Piece:
        parts = tuple((f"{hf}.{letter}_proj.{kind}", (count, *columns)) for letter, count in rows.items())
        name = f"self_attention.linear_qkv.{kind}"
        return Piece(name, (packed, *columns), parts, layer, transform=PackQKV(groups))

    return [
        linear(
            "self_attention.linear_qkv.layer_norm_weight", f"{_prefix(layer)}.input_layernorm.weight", (hidden,), layer
        ),
        qkv("weight", hidden),
        *([qkv("bias")] if bias else []),
        linear("self_attention.linear_proj.weight", f"{hf}.o_proj.weight", (hidden, rows["q"]), layer),
    ]


def head_norms(config: PretrainedConfig, layer: int, *, whole: bool) -> list[Piece]:
    """Norms of queries and keys. whole: over all heads together, else one weight for every head."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    return [
        linear(
            f"self_attention.{letter}_layernorm.weight",
            f"{_prefix(layer)}.self_attn.{letter}_norm.weight",
            ((count if whole else 1) * head_dim(config),),
            layer,
        )
        for letter, count in heads.items()
    ]


def experts_in(config: PretrainedConfig) -> int:
    """Routed experts of a layer; 0 in a dense model."""
    return getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 0


def own_k(config: PretrainedConfig) -> int | None:
    """The model's number of active experts; None in a dense model."""
    return config.num_experts_per_tok if experts_in(config) else None


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}"
