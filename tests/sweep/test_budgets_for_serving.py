"""The table of named budgets that a sweep gives is the one that the vLLM plugin reads."""

from pathlib import Path

from megatron_emoe.sweep import named_budgets
from tests.sweep_results import make_result

SERVING = Path(__file__).resolve().parents[2] / "serving"


def test_the_plugin_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SERVING))
    from emoe_vllm.budgets import Model, read_budgets

    cells = {1: 2.6, 2: 2.04, 4: 2.0, (8, 12): 1.98}
    table = named_budgets.budget_table(make_result("mine", cells, latency={2: 1.5}))
    path = tmp_path / "budgets.json"
    named_budgets.save(table, path)
    found = read_budgets(str(path), "flag", Model(k_train=4, experts=16, layers=2, most=16))
    assert [(budget.name, budget.k) for budget in found] == [("fast", 2), ("default", 4), ("best", (8, 12))]
    written = [(budget.quality, budget.expert_flops) for budget in table.budgets]
    assert [(budget.quality, budget.expert_flops) for budget in found] == written
    assert [flops for _, flops in written] == [0.5, 1.0, 2.5]
