"""Attention of released models that Megatron-Core's own cannot express: only what differs from the core's classes.

OLMoE (arXiv 2409.02060, section 2) norms queries and keys over their whole width, before they are split into heads,
and can clamp them. DeepSeek-V2-Lite (arXiv 2405.04434, appendix B) norms the compressed keys and values only.
Shapes: S positions, B sequences, N heads of this rank, D width of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class FullWidthNorm(nn.Module, ABC):
    """RMSNorm over all heads together, for the spec's q_layernorm and k_layernorm (arXiv 2409.02060, section 2).

    With tensor parallelism a rank has some of the heads: the sum of squares goes over all of them. Every rank holds the
    whole weight and uses its part. The core sums the gradients of whatever is called q_layernorm or k_layernorm over
    the tensor-parallel ranks; as each is zero outside its part, the sum is the gradient of the whole weight, and a
    checkpoint holds one tensor [width] whatever the number of ranks.

    hidden_size: D, as the core calls it. eps: added to the mean of squares.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.width = self.heads(config) * hidden_size
        ranks = get_tensor_model_parallel_world_size()
        self.copies = max(1, ranks // self.heads(config))  # more ranks than heads: several hold the same one
        self.local_width = self.width * self.copies // ranks
        self.weight = nn.Parameter(torch.ones(self.width, dtype=config.params_dtype))

    @staticmethod
    @abstractmethod
    def heads(config: TransformerConfig) -> int:
        """The number of heads over all ranks."""

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Normed heads, in shape and dtype of `x_SBND`; statistics in fp32."""
        x = x_SBND.float()
        squares = x.pow(2).sum((-2, -1), keepdim=True)
        squares = copy_to_tensor_model_parallel_region(reduce_from_tensor_model_parallel_region(squares))
        x = x * torch.rsqrt(squares / (self.copies * self.width) + self.eps)
        first = get_tensor_model_parallel_rank() // self.copies * self.local_width
        weight_ND = self.weight[first : first + self.local_width].view(x_SBND.shape[-2:])
        return weight_ND * x.to(x_SBND.dtype)


class FullWidthQueryNorm(FullWidthNorm):
    """FullWidthNorm of the queries."""

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        """All attention heads."""
        return config.num_attention_heads


class FullWidthKeyNorm(FullWidthNorm):
    """FullWidthNorm of the keys."""

    @staticmethod
    def heads(config: TransformerConfig) -> int:
        """All query groups: a key serves a group of queries."""
        return config.num_query_groups or config.num_attention_heads


class ClippedSelfAttention(SelfAttention):
    """Queries, keys and values clamped to [-c, c], after their norm and before rotary embedding; c is
    --emoe-clip-qkv."""

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Query [S, B, N, D], key and value [S, B, query groups of this rank, D], and what else the core returns."""
        query, key, value, *gate = super().get_query_key_value_tensors(*args, **kwargs)
        limit = self.config.emoe_clip_qkv
        return *(tensor.clamp(-limit, limit) for tensor in (query, key, value)), *gate


LATENT_EPSILON = 1e-6
"""Of the norm of compressed keys and values, in every model of DeepSeek's whatever the epsilon of its other norms."""


class LatentSelfAttention(MLASelfAttention):
    """Multi-latent attention that can leave queries without a norm (DeepSeek-V2-Lite, arXiv 2405.04434, equation 9 and
    appendix B), and whose local form has right gradients with tensor parallelism."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.emoe_qk_norm == "latent":
            fused = isinstance(self.kv_layernorm, IdentityOp)  # into the projection behind it (Transformer Engine)
            (self.linear_kv_up_proj if fused else self.kv_layernorm).eps = LATENT_EPSILON

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """What to build. With --emoe-qk-norm latent that is what the spec says; the core's rule would put a norm of the
        layer's input before the queries' projection (Transformer Engine), or refuse (local)."""
        if self.config.emoe_qk_norm != "latent":
            return super()._resolve_qk_norm_config(submodules)
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Compressed queries and keys with values, of this rank's part of the sequence, [S / ranks, B, their width].

        The local projection is split over the ranks. The core would gather its output and hand the rotary part to every
        rank's heads, and in the backward pass drop what all heads but a rank's own add to that part's gradient. In this
        form, which is Transformer Engine's, it gathers that part itself and adds the gradients up.
        """
        queries, keys_values = super()._qkv_down_projection(hidden_states)
        whole = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        if self.config.sequence_parallel and keys_values.size(-1) != whole:
            keys_values = gather_from_tensor_model_parallel_region(keys_values)
            keys_values = scatter_to_sequence_parallel_region(keys_values)
        return queries, keys_values


def barred_between_documents(cu_seqlens: Tensor, tokens: int, rows: int = 1) -> Tensor:
    """Where attention is barred: to later tokens, and to those of other documents. bool [rows, 1, S, S], S = T / rows.

    cu_seqlens: int32 [documents + 1], where each document of the T `tokens` begins, and the end; a row ends with a
    document. No sync.
    """
    place = torch.arange(tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens, place, right=True).view(rows, 1, -1)
    later = torch.ones(tokens // rows, tokens // rows, dtype=torch.bool, device=cu_seqlens.device).triu(1)
    return (document.unsqueeze(-1) != document.unsqueeze(-2)) | later


class PackedDotProductAttention(DotProductAttention):
    """The core's own dot-product attention, which packed documents can share a sequence in (--sft,
    --dataloader-inter-document-masking): each attends to itself alone. Transformer Engine has kernels for that; here it
    is a mask of tokens x tokens."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As the core's, [S, B, width]; packed query, key and value are [T, N, D], and so is the result."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, *args, **kwargs)
        tokens = query.size(0)
        rows = tokens // (packed_seq_params.tokens_per_sample or tokens)
        barred = barred_between_documents(packed_seq_params.cu_seqlens_q, tokens, rows)
        value = value[..., : self.hidden_size_per_partition // self.num_attention_heads_per_partition]
        apart = (each.view(rows, -1, *each.shape[1:]).transpose(0, 1).contiguous() for each in (query, key, value))
        context = super().forward(*apart, barred, *args, **kwargs)
        return context.transpose(0, 1).reshape(tokens, self.num_attention_heads_per_partition, -1)


class LatentDotProductAttention(PackedDotProductAttention):
    """The core's own dot-product attention with values narrower or wider than keys, as multi-latent attention asks for.

    v_channels: width of a head's values; unset where the core builds an ordinary one first, which it then replaces.
    k_channels: that of its keys, from which nothing follows here.
    """

    def __init__(self, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
