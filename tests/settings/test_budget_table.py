"""The table of learned scales in an exported config.json: read as it was written, and what is no table."""

import re
from typing import Any

import pytest
import torch

from megatron_emoe.routing.budget_scales import RATE, at_budget, log_scales
from megatron_emoe.settings.budget_table import BudgetTable, read_budget_table

KS, OWN = (2, 4, 8), 4


def table(seed: int = 3) -> tuple[torch.Tensor, BudgetTable]:
    """Parameters of two layers [2, 24], and the table of them."""
    parameters = torch.randn(2, 3 * 8, generator=torch.Generator().manual_seed(seed))
    learned = [RATE * layer.view(3, 8) * torch.tensor([[1.0], [0.0], [1.0]]) for layer in parameters]  # 0: at OWN
    rows = [[layer[row, :k].tolist() for row, k in enumerate(KS)] for layer in learned]
    return parameters, BudgetTable(KS, tuple(tuple(tuple(row) for row in layer) for layer in rows))


@pytest.mark.parametrize("k", range(1, 13))
def test_what_is_written_is_read_and_is_the_router_s(k):
    parameters, written = table()
    again = read_budget_table({"budget_scales": written.as_json()}, layers=2, experts=16)
    assert again == written
    for layer in (0, 1):
        found = at_budget(torch.tensor(again.padded(layer)), again.ks, k)
        assert found.tolist() == pytest.approx(log_scales(parameters[layer], KS, k, OWN).tolist(), rel=1e-5)


def test_no_block_has_no_table():
    assert read_budget_table(None, 2, 16) is read_budget_table({"k_train": 4}, 2, 16) is None


@pytest.mark.parametrize(
    ("found", "rule"),
    [
        (5, "emoe.budget_scales: must be an object with the keys k and log"),
        ({"k": [2]}, "emoe.budget_scales: must be an object with the keys k and log"),
        ({"k": [], "log": []}, "emoe.budget_scales.k []: must be whole numbers in [1, 16], ascending"),
        ({"k": [4, 2], "log": []}, "emoe.budget_scales.k [4, 2]: must be whole numbers in [1, 16], ascending"),
        ({"k": [True], "log": []}, "emoe.budget_scales.k [True]: must be whole numbers in [1, 16], ascending"),
        ({"k": [17], "log": []}, "emoe.budget_scales.k [17]: must be whole numbers in [1, 16], ascending"),
        ({"k": [1], "log": [[[0.0]]]}, "emoe.budget_scales.log: must have one entry for each of the 2 layers"),
        ({"k": [1], "log": [[[0.0]], 7]}, "emoe.budget_scales.log: must have, for every layer, 1 numbers"),
        (
            {"k": [1, 2], "log": [[[0.0], [0.0]]] * 2},
            "emoe.budget_scales.log: must have, for every layer, 1, 2 numbers",
        ),
        ({"k": [1], "log": [[[0.0]], [["a"]]]}, "emoe.budget_scales.log: 'a'; must be a number in [-40, 40]"),
        ({"k": [1], "log": [[[0.0]], [[1000]]]}, "emoe.budget_scales.log: 1000; must be a number in [-40, 40]"),
        ({"k": [1], "log": [[[0.0]], [[-(10**400)]]]}, "emoe.budget_scales.log: -1000"),
        ({"k": [1], "log": [[[0.0]], [[float("nan")]]]}, "emoe.budget_scales.log: nan; must be a number in"),
    ],
)
def test_what_is_no_table(found: Any, rule: str):
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        read_budget_table({"budget_scales": found}, layers=2, experts=16)
