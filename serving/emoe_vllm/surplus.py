"""On a GPU: how an expert kernel is kept from working on the experts past a token's k'. Not run: no GPU was at hand.

A graph has the largest k' for every token, so the tensor of experts keeps that width, and what is past a token's k'
must be dropped inside the kernel. No kernel is given an expert of -1: some write out of bounds with it, and Triton's
would sum rows that nothing wrote. What vLLM's Triton experts do handle is expert parallelism: an expert that another
rank holds is left out of the alignment and of the sum. So a layer with E experts is told of E + 1, of which the last is
held elsewhere, and surplus ranks go there. Every other kernel gets the experts themselves with weights of 0, which is
right and saves nothing. Shape suffixes: T tokens, K ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger

logger = init_logger(__name__)


def elsewhere(layer: Any) -> int | None:
    """Make `layer` (RoutedExperts, loaded) know one expert more than it has, which no rank holds; the expert's number.

    None, and nothing is changed, for kernels that are not known to leave out what is elsewhere.
    """
    kernel: Any = getattr(getattr(layer.quant_method, "moe_kernel", None), "fused_experts", None)
    if type(kernel).__name__ != "TritonExperts" or kernel.quant_dtype is not None:
        logger.warning_once(
            "experts past a token's k' are computed with a weight of 0 by %s: right, but no work is saved", type(kernel)
        )
        return None
    number = layer.global_num_experts
    known_E = layer._expert_map
    if known_E is None:
        known_E = torch.arange(number, dtype=torch.int32, device=layer.w13_weight.device)
    layer._expert_map = torch.cat([known_E, known_E.new_full((1,), -1)])
    layer.global_num_experts = number + 1
    return number


def without_surplus(experts_TK: Tensor, k_T: Tensor, number: int) -> Tensor:
    """The experts of every token, those past its k' replaced by the one that is elsewhere."""
    ranks_K = torch.arange(experts_TK.shape[1], device=experts_TK.device)
    return experts_TK.masked_fill(ranks_K >= k_T.unsqueeze(1), number)
