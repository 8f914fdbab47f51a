"""ElasticMoELayer: Megatron-Core's MoELayer whose dispatcher follows the active k."""

from __future__ import annotations

from copy import copy

from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor


class ElasticMoELayer(MoELayer):
    """Hands the k of each forward pass from the router to the token dispatcher.

    The dispatchers size their output as tokens x config.moe_router_topk. Theirs becomes a private shallow copy of the
    layer's configuration in which that one field follows the router. k is a number on the host: no sync is added.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.token_dispatcher.config = copy(self.config)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """As the core's, after telling the dispatcher how many experts each token has."""
        self.token_dispatcher.config.moe_router_topk = self.router.topk
        return super().preprocess(hidden_states, probs, routing_map)
