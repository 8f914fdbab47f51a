"""Low-rank experts on one linear layer: all of them in two dense products, with the routing weights between them.

Sources: LoRA, arXiv 2106.09685; experts of it behind a router, LoRAMoE, arXiv 2312.09979. Shape suffixes: T tokens, E
experts, R rank, X = E R (expert after expert), I inputs, O outputs of the linear layer.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from megatron_emoe.routing.transformer_config import ElasticTransformerConfig


class LowRankExperts(MegatronModule):
    """E products B_e A_e beside the frozen weight of one linear layer: `a` holds the A_e [X, I], `b` the B_e [O, X].

    The layer's output gains the sum over a token's experts of weight_e scale B_e A_e x. A starts as LoRA starts it, B
    at zero: a new model computes what its base does.

    split: which side tensor parallelism cuts in the layer. "outputs" (column parallel) cuts b, "inputs" (row parallel)
    cuts a. The other of the two every rank holds whole. It sees this rank's share of the tokens under sequence
    parallelism, and is marked as Megatron-Core marks its norms: its gradients are summed over the ranks.
    """

    config: ElasticTransformerConfig

    def __init__(
        self,
        config: ElasticTransformerConfig,
        inputs: int,
        outputs: int,
        split: Literal["inputs", "outputs"],
        tp_group: ProcessGroup,
    ) -> None:
        super().__init__(config)
        self.experts, self.rank = config.num_moe_experts, config.lora_rank
        self.scale, self.split, self.tp_group = config.lora_scale, split, tp_group
        share, width = tp_group.size(), self.experts * self.rank
        cut_in, cut_out = (share, 1) if split == "inputs" else (1, share)
        self.a = Parameter(torch.zeros(width, inputs // cut_in, dtype=config.params_dtype))
        self.b = Parameter(torch.zeros(outputs // cut_out, width, dtype=config.params_dtype))
        self.gated = split == "outputs" and config.gated_linear_unit
        cut, whole, axis = (self.b, self.a, 0) if split == "outputs" else (self.a, self.b, 1)
        set_tensor_model_parallel_attributes(cut, is_parallel=True, dim=axis, stride=2 if self.gated else 1)
        whole.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        if config.perform_initialization:
            self._start(inputs)

    @torch.no_grad()
    def _start(self, inputs: int) -> None:
        """LoRA's start of A: uniform in +-1 / sqrt(inputs). Drawn whole on the CPU: every layout starts alike."""
        whole_XI = torch.empty(self.a.shape[0], inputs).uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
        if self.split == "inputs":
            whole_XI = whole_XI.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        self.a.copy_(whole_XI)

    def forward(self, x: Tensor) -> Tensor:
        """A x: [sequence, batch, X], of this rank's inputs only where those are cut.

        What comes first in a pass, so that this module is called before its weights are read: with
        --overlap-param-gather the core waits for them in a hook on that call.
        """
        return torch.nn.functional.linear(x, self.a)

    def weighted(self, middle: Tensor, weights_TE: Tensor) -> Tensor:
        """What the call gave, every expert's part times its weight and the scale, in the same dtype. weights_TE: of the
        same tokens, 0 for experts that a token does not use."""
        spread = middle.unflatten(-1, (self.experts, self.rank))
        weights = weights_TE.view(*middle.shape[:-1], self.experts, 1)
        return (spread * (weights * self.scale)).flatten(-2).type_as(middle)

    def added(self, base: Tensor, weighted: Tensor) -> Tensor:
        """base + B weighted: [sequence, batch, O], of this rank's outputs only where those are cut."""
        sum_TO = torch.addmm(base.flatten(0, -2), weighted.flatten(0, -2), self.b.t())
        return sum_TO.view_as(base)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """As the core stores the linear layer: b of a gated layer as two tensors, so that every layout can load it."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        axes = {"b": 0} if self.split == "outputs" else {"a": 1}
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        stored = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)
        if self.gated:
            singletons = metadata.get("singleton_local_shards", False)
            key = f"{prefix}b"
            stored[key] = apply_swiglu_sharded_factory(
                stored[key],
                sharded_offsets,
                singletons,
                tp_group=self.tp_group,
                dp_group=metadata["dp_cp_group"],
            )
        return stored
