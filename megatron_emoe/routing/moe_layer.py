"""ElasticMoELayer: Megatron-Core's MoELayer whose dispatcher follows the active k."""

from __future__ import annotations

import math
from copy import copy

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor


class ElasticMoELayer(MoELayer):
    """Hands the k of each forward pass from the router to the token dispatcher.

    The dispatchers size their output as tokens x config.moe_router_topk. Theirs becomes a private shallow copy of the
    layer's configuration in which that one field follows the router. k is a number on the host: no sync is added. The
    flex dispatcher reads the same copy, and where it looks up a token's experts itself, it is told how many there are.
    Its buffers need nothing: they are sized by tokens.

    Where each token has its own number of experts (top-p, null experts) that product is not known. The core counts the
    routing map instead where tokens may be dropped, and the private configuration says so: with a capacity without
    limit nothing is dropped.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        dispatcher = self.token_dispatcher
        dispatcher.config = copy(self.config)
        if isinstance(dispatcher, MoEFlexTokenDispatcher):
            manager = dispatcher._comm_manager
            manager.config = dispatcher.config
            assert hasattr(manager, "router_topk") == self._looks_up_experts(), "the core's flex dispatcher has changed"
        if self.config.counts_vary:
            # Sync: the all-to-all dispatcher then waits for this count before it permutes, once per layer and pass. The
            # all-gather dispatcher always waits for one.
            dispatcher.config.moe_expert_capacity_factor = math.inf

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor | None) -> tuple[Tensor, Tensor]:
        """As the core's, after telling the dispatcher how many experts each token has.

        Raises:
            ValueError: rows cannot be padded for FP8 at every k; see `_padded_apart`.
        """
        self._tell_dispatcher(self.router.topk)
        if routing_map is None:  # the replay of a CUDA graph, in which all of this happened: the core takes its results
            return super().preprocess(hidden_states, probs, routing_map)
        # The flex dispatcher pads what it has received and leaves the map as it is.
        if self.token_dispatcher.config.moe_router_padding_for_quantization and not self._flex():
            routing_map = self._padded_apart(routing_map)
        asked = routing_map.sum() if self.pads() and not self.training else None  # before rows are added in place
        preprocessed = super().preprocess(hidden_states, probs, routing_map)
        if asked is not None:
            self._asked = asked
            self._added = 0 if self._flex() else self.token_dispatcher.routing_map.sum() - asked
        return preprocessed

    def pads(self) -> bool:
        """Whether the dispatcher may hand the experts rows that are no token's, to fill the blocks of FP8 kernels."""
        config = self.token_dispatcher.config
        return get_align_size_for_quantization(config) > 0 and (
            self._flex() or config.moe_router_padding_for_quantization
        )

    def rows_of_tokens(self, received: int, shards: int) -> int | Tensor:
        """How many of the rows that the experts have received in an evaluation pass count as tokens', so that the sum
        over all ranks is right: a rank takes off what it had added. A row's weight does not tell; it may be 0.

        What the flex dispatcher adds, its library knows alone: there, what this rank's tokens ask for counts instead.
        shards: ranks that share an expert and receive the same rows.
        """
        if not self.pads():
            return received
        return shards * self._asked if self._flex() else received - shards * self._added

    def _flex(self) -> bool:
        return isinstance(self.token_dispatcher, MoEFlexTokenDispatcher)

    def _tell_dispatcher(self, k: int) -> None:
        dispatcher = self.token_dispatcher
        dispatcher.config.moe_router_topk = k
        if self._flex() and self._looks_up_experts():
            dispatcher._comm_manager.router_topk = dispatcher.tp_size * k  # the core repeats a token for each TP rank

    def _looks_up_experts(self) -> bool:
        """Whether the flex dispatcher turns probabilities into k indices per token; HybridEP takes the map."""
        return self.config.moe_flex_dispatcher_backend != "hybridep"

    def _padded_apart(self, map_TE: Tensor) -> Tensor:
        """A copy for the dispatcher to add rows to. It does so in place, and the router's map, which statistics and
        the backward pass of its weights may still read, stays as it is.

        Raises:
            ValueError: k varies, and tokens do not fill whole blocks: at a large k an expert that nearly every token
                uses would find no token to fill its last block with.
        """
        config, tokens = self.token_dispatcher.config, map_TE.shape[0]
        block = get_align_size_for_quantization(config)
        varies = config.draws_k or config.counts_vary or config.emoe_eval_k or self.router.topk != self.router.model_k
        if varies and tokens % block:
            raise ValueError(
                f"--moe-router-padding-for-quantization: with a varying k the {tokens} tokens of a rank's micro-batch "
                f"must be a multiple of {block}; without this flag the experts pad their rows themselves"
            )
        return map_TE.clone()
