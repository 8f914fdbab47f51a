"""What tests/gpu and test_device_runs.py compare: the runs, their flags on either device, and the bounds."""

from typing import Any

import torch

from tests.device_runs import ON_DEVICE, layer_waits
from tests.tiny import COACTIVATION, flags

ELASTIC: dict[str, dict[str, Any]] = {
    "coactivation": COACTIVATION | {"emoe_hr_loss_coeff": 1e-3},
    "prefix": {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4},
    "recipe": {
        "emoe_selection": "prefix",
        "emoe_k_schedule": "default-or-larger",
        "emoe_k_draw": "layer",
        "emoe_tail_scale": "0.25",
    },
    "budgets": {
        "emoe_selection": "prefix",
        "emoe_k_schedule": "stratified",
        "emoe_k_grid": [1, 4],
        "emoe_budget_scales": True,
    },
}
FIRST_STEP, FOUR_STEPS = 1e-5, 1e-3
"""Largest relative difference of a micro-batch's loss in fp32 between two devices."""
EXACT = {"moe_aux_loss_coeff": 1e-2}
MICRO_BATCHES = 4


def run_words(device: str, **changes: Any) -> list[str]:
    """Flags of a tiny training run in fp32 on the device."""
    return flags(**EXACT, **changes) + ON_DEVICE[device]


def wait_words(device: str, **changes: Any) -> list[str]:
    """The same, unlogged, with one micro-batch and no look at the loss: what waits then is the step itself."""
    unlogged = {"log_interval": 1000000, "train_iters": 1000, "no_check_for_nan_in_loss_and_grad": True}
    unlogged |= {"no_create_attention_mask_in_dataloader": True}
    return flags(**EXACT | unlogged | changes) + ON_DEVICE[device]


def one_layer(elastic: dict[str, Any] | None, dispatcher: str) -> list[str]:
    """layer_waits of a stock layer, or of an elastic one with these settings."""
    settings = dict(elastic or {})
    if "emoe_tail_scale" in settings:
        settings["emoe_tail_scale"] = [settings["emoe_tail_scale"]]  # a configuration has the list of its words
    return layer_waits(None if elastic is None else settings, moe_token_dispatcher_type=dispatcher)


def equal_runs(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """AssertionError unless losses, gradients and weights are equal to the bit, and there are some."""
    assert ours["losses"] == theirs["losses"] and ours["losses"]
    assert len(ours["gradients"]) == len(theirs["gradients"]) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours["gradients"], theirs["gradients"], strict=True))
    assert ours["weights"].keys() == theirs["weights"].keys() and ours["weights"]
    for name, weight in ours["weights"].items():
        assert torch.equal(weight, theirs["weights"][name]), name


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float]:
    """Of the losses of the first step, and of all: relative."""
    pairs = zip(ours["losses"], theirs["losses"], strict=True)
    differences = [abs(a - b) / abs(b) for a, b in pairs]
    return max(differences[:MICRO_BATCHES]), max(differences)
