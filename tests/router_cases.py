"""ElasticRouter with and without the fused kernel, for any device: in Triton's interpreter, or on a GPU."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tests.tiny import COACTIVATION, begin, build_layer, hidden_states, layer_config

LOSSES = {
    "emoe_hr_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.03,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.05],
}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
LARGER = {
    "emoe_selection": "prefix",
    "emoe_k_schedule": "default-or-larger",
    "emoe_k_default_prob": 0.2,
    "emoe_k_max": 6,
    "emoe_tail_scale": ["0.25"],
}
ROUTERS: dict[str, dict[str, Any]] = {
    "coactivation": COACTIVATION | LOSSES,
    "balance on top-k": COACTIVATION | LOSSES | {"emoe_balance_on": "topk"},
    "no losses": COACTIVATION | {"emoe_hr_loss_coeff": 0.0},
    "entropy measured alone": COACTIVATION | {"emoe_hr_loss_coeff": 0.0, "moe_router_pre_softmax": False},
    "pool per micro-batch": COACTIVATION | {"emoe_pool_draw": "microbatch", "emoe_pool_prob": 0.7},
    "sigmoid, bias": COACTIVATION | SIGMOID | LOSSES,
    "softmax, bias": {"moe_router_enable_expert_bias": True} | LOSSES,
    "groups": COACTIVATION | {"moe_router_num_groups": 2, "moe_router_group_topk": 1, "emoe_pool_k": 4},
    "prefix with a tail": LARGER | LOSSES,
    "raw": {"emoe_combine": "raw", "moe_router_pre_softmax": False},
    "capacity": COACTIVATION | LOSSES | {"moe_expert_capacity_factor": 1.0},
    "per token": COACTIVATION | LOSSES | {"calculate_per_token_loss": True},
}
PADDED = ("coactivation", "balance on top-k", "sigmoid, bias", "prefix with a tail", "per token")
"""Those to compare with tokens that do not count, too."""


def watch_kernel(calls: list[str]) -> Any:
    from megatron_emoe.routing import kernel as router_kernel

    def watched(name: str) -> Callable[..., Any]:
        function = getattr(router_kernel, name)
        return lambda *args: calls.append(name) or function(*args)

    return patch.multiple(router_kernel, _forward=watched("_forward"), _backward=watched("_backward"))


def train(settings: dict[str, Any], padded: bool, recompute: bool, device: str = "cpu") -> dict[str, list[Tensor]]:
    """Probabilities, maps, gradients of weight and input, and tracked values of three steps."""
    from megatron.core.tensor_parallel import checkpoint

    from megatron_emoe.routing.metrics import get_elastic_tracker

    router = build_layer(layer_config(**settings)).router.to(device)
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    mask = None
    if padded:
        mask = torch.zeros(8, 2, dtype=torch.bool, device=device)
        mask[5:, 1] = True
    seen: dict[str, list[Tensor]] = {name: [] for name in ("probs", "map", "weight", "input", "values")}
    tracker = get_elastic_tracker()
    for step in range(3):
        begin(step)
        tracker.clear()
        tracker.measuring = step < 2
        router.weight.grad, x = None, hidden_states(seed=step).detach().to(device).requires_grad_()
        probs, routed = checkpoint(router, False, x, mask) if recompute else router(x, mask)
        (probs * torch.linspace(-1, 1, 8, device=device)).sum().backward()
        seen["probs"].append(probs.detach()), seen["map"].append(routed)
        seen["weight"].append(router.weight.grad), seen["input"].append(x.grad)
        seen["values"].append(torch.tensor(tracked_values(tracker)))
    if router.enable_expert_bias:
        seen["values"].append(router.local_tokens_per_expert)
    return seen


def tracked_values(tracker: Any) -> list[float]:
    """The core's losses of the layer, then ours, then the load of each expert."""
    values = [entry.values.sum().item() for _, entry in sorted(tracker.metrics.items())]
    values += [float(value) for sums in tracker._sums.values() for _, value in sorted(sums.items())]
    return values + [count.item() for counts in tracker._loads.values() for count in counts]


def both_ways(settings: dict[str, Any], padded: bool, recompute: bool, device: str = "cpu") -> list[Any]:
    """What `train` gives with --moe-router-fusion and without, and the calls of the kernels."""
    calls: list[str] = []
    unfused = train(settings, padded, recompute, device)
    with watch_kernel(calls):
        fused = train(settings | {"moe_router_fusion": True}, padded, recompute, device)
    return [fused, unfused, calls]


def compare(fused: dict[str, list[Tensor]], unfused: dict[str, list[Tensor]], rtol: float, atol: float) -> None:
    """Maps to the bit, numbers within the bounds."""
    for name, tensors in unfused.items():
        assert len(tensors) == len(fused[name]) > 0
        for ours, wanted in zip(fused[name], tensors, strict=True):
            if name == "map":
                assert torch.equal(ours, wanted)
            else:
                torch.testing.assert_close(
                    ours, wanted, rtol=rtol, atol=atol, msg=lambda text, of=name: f"{of}: {text}"
                )
