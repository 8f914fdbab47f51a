"""torch's Adam with the state layout of the fused Adams of Apex and Transformer Engine, where neither is installed.

Megatron-Core then takes torch's own, and its distributed optimizer cannot go on from what it saved with it: it asks for
the step of each parameter before there is one.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer
from torch.optim.adam import adam


class TorchAdam(torch.optim.Optimizer):
    """torch's Adam, whose `step` is in the group and whose parameters have two moments each.

    torch's own keeps one step per parameter, and the core gives all parameters one and the same tensor when a
    checkpoint is loaded, which each of them then advances. fused: torch's kernel for CPUs; else torch.optim.AdamW's.
    """

    fused = False

    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.decoupled = adam_w_mode

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every group that has parameters."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._step_group(group, [p for p in group["params"] if p.grad is not None])

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        for state, p in [(self.state[p], p) for p in params]:
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        moments = [[self.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")]
        steps = [torch.tensor(group["step"] - 1.0) for _ in params]  # on the CPU, as torch's Adam has them: no sync
        hyper = {key: group[key] for key in ("lr", "weight_decay", "eps")}
        hyper["beta1"], hyper["beta2"] = group["betas"]
        switches = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": self.decoupled}
        if self.fused:
            switches["fused"] = True
        adam(params, [p.grad for p in params], *moments, [], steps, **hyper, **switches)


def use_torch_adam(*, fused: bool) -> None:
    """Have the core's optimizers take TorchAdam for a fused Adam. fused: with torch's fused kernel, on a CPU."""
    TorchAdam.fused = fused
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = TorchAdam, False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    # The default checkpoint layout copies into shards that are views of fp32 weights; only this loader lacks no_grad.
    sharded = distrib_optimizer.DistributedOptimizer
    load = sharded.load_parameter_state_from_dp_reshardable
    sharded.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)


def use_torch_adam_on_a_gpu() -> None:
    """The same where the core has found neither Apex nor Transformer Engine; its steps equal torch.optim.AdamW's."""
    if optimizer.USING_PYTORCH_OPTIMIZER:
        use_torch_adam(fused=False)
