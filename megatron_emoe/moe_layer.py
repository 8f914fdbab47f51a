"""ElasticMoELayer: Megatron-Core's MoELayer whose dispatcher follows the active k."""

from __future__ import annotations

import math
from copy import copy

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor


class ElasticMoELayer(MoELayer):
    """Hands the k of each forward pass from the router to the token dispatcher.

    The dispatchers size their output as tokens x config.moe_router_topk. Theirs becomes a private shallow copy of the
    layer's configuration in which that one field follows the router. k is a number on the host: no sync is added.

    Where each token has its own number of experts (top-p, null experts) that product is not known. The core counts the
    routing map instead where tokens may be dropped, and the private configuration says so: with a capacity without
    limit nothing is dropped.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.token_dispatcher.config = copy(self.config)
        if self.config.counts_vary:
            # Sync: the all-to-all dispatcher then waits for this count before it permutes, once per layer and pass. The
            # all-gather dispatcher always waits for one.
            self.token_dispatcher.config.moe_expert_capacity_factor = math.inf

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """As the core's, after telling the dispatcher how many experts each token has."""
        self.token_dispatcher.config.moe_router_topk = self.router.topk
        return super().preprocess(hidden_states, probs, routing_map)
