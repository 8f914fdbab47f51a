"""What is logged, against numbers worked out by hand, on one process and reduced over two ranks."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_logging
from safetensors import safe_open

from megatron_emoe.routing.metrics import (
    ElasticMetricsTracker,
    coverage,
    get_elastic_tracker,
    load_entropy,
    load_statistics,
)
from tests.distributed import run_ranks


def dense(*experts_of_token: tuple[int, ...], experts: int = 4) -> torch.Tensor:
    """Routing map of tokens that use these experts."""
    map_TE = torch.zeros(len(experts_of_token), experts, dtype=torch.bool)
    for token, used in enumerate(experts_of_token):
        map_TE[token, list(used)] = True
    return map_TE


def test_load_statistics_by_hand():
    # Layer 1: mean 20, so shares .5 0 1 1.5 2. Sorted 0 .5 1 1.5 2; the 5 % point lies .05 * 4 = .2 of the way from the
    # first to the second: .1; the 95 % point .8 of the way from the fourth to the fifth: 1.9. One expert is dead.
    # Layer 2: every expert has its share.
    statistics = load_statistics(torch.tensor([[10, 0, 20, 30, 40], [7, 7, 7, 7, 7]]))
    expected = {
        "load min": [0.0, 1.0],
        "load p5": [0.1, 1.0],
        "load p50": [1.0, 1.0],
        "load p95": [1.9, 1.0],
        "load max": [2.0, 1.0],
        "dead experts": [1.0, 0.0],
    }
    assert {name: values.tolist() for name, values in statistics.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }


def test_load_statistics_of_a_layer_without_tokens():
    statistics = load_statistics(torch.zeros(1, 4))
    assert statistics["dead experts"].tolist() == [4.0]
    assert statistics["load max"].tolist() == [0.0]  # not 0/0


def test_load_entropy_by_hand():
    # Even: ln 4. Halves: ln 2. 1/2 1/4 1/4 0: ln 2 / 2 + ln 4 / 2. No token: 0.
    loads = torch.tensor([[5.0, 5, 5, 5], [3, 3, 0, 0], [2, 1, 1, 0], [0, 0, 0, 0]])
    assert load_entropy(loads).tolist() == pytest.approx([1.386294, 0.693147, 1.039721, 0])


def test_coverage_by_hand():
    # 4 experts, 6 pairs: 0-1 three times, 0-2 once, 2-3 five times. The diagonal is an expert's own load and no pair.
    pairs = torch.diag(torch.tensor([9, 9, 9, 9])).unsqueeze(0)
    for a, b, count in ((0, 1, 3), (0, 2, 1), (2, 3, 5)):
        pairs[0, a, b] = pairs[0, b, a] = count
    assert [coverage(pairs, at_least=n).item() for n in (1, 3, 5, 6)] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0])
    assert coverage(pairs).item() == pytest.approx(0.5)
    two_layers = torch.cat([pairs, torch.ones(1, 4, 4, dtype=torch.long)])
    assert coverage(two_layers).tolist() == pytest.approx([0.5, 1.0])


def test_which_steps_are_measured():
    # Iterations count from 0, the log from 1: every third step of the log is the iteration 2, 5, ...
    tracker = ElasticMetricsTracker()
    measured, pairs = [], []
    for iteration in range(8):
        tracker.begin_step(iteration, log_interval=3, coactivation_interval=4)
        measured += [iteration] * tracker.measuring
        pairs += [iteration] * tracker.measuring_pairs
    assert (measured, pairs) == ([2, 5], [3, 7])
    tracker.begin_step(3, log_interval=1, coactivation_interval=0)
    assert tracker.measuring and not tracker.measuring_pairs


@pytest.fixture
def one_rank(monkeypatch) -> ElasticMetricsTracker:
    """A tracker of 2 layers and 4 experts whose reductions stay in this process."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(
        moe_logging.MoEMetricsTracker, "_sync_metrics", lambda *args: None
    )  # nothing of the core's here
    tracker = ElasticMetricsTracker()
    tracker.configure(2, 4, None)
    return tracker


def step(tracker: ElasticMetricsTracker, entropy: float, iteration: int = 0, writer=None, **report) -> str:
    """One training step of one micro-batch through layer 2, and its log line."""
    tracker.begin_step(iteration, log_interval=2, coactivation_interval=0)
    if tracker.measuring:
        values = {"router entropy": torch.tensor(entropy), "hierarchical router loss": torch.tensor(-1.0)}
        tracker.add_values(2, values)
    tracker.add_routing(2, dense((0, 1), (0, 2)), None, 2, 2)
    return tracker.report(1.0, iteration=iteration + 1, writer=writer, num_layers=2, **report)


def test_nothing_is_recorded_on_other_steps(one_rank):
    assert "active k" not in step(one_rank, 1.0, iteration=0)
    line = step(one_rank, 1.0, iteration=1)
    # Had the first step been counted, the sums would hold two passes; loads are 2 1 1 0 either way, entropy is not.
    assert " active k: 2 | pool size: 2 | hierarchical router loss: -1 | router entropy: 1 |" in line
    assert " load entropy: 1.04 |" in line  # of 1/2 1/4 1/4 0: ln 2 / 2 + ln 4 / 2
    # Loads 2 1 1 0 are shares 2 1 1 0: sorted 0 1 1 2, 5 % at .15 of the way up: .15; 95 % at 2.85: 1.85.
    assert " load min: 0 | load p5: 0.15 | load p50: 1 | load p95: 1.85 | load max: 2 | dead experts: 1 |" in line


def test_the_mean_is_reported_where_every_token_has_its_own_k(one_rank):
    one_rank.begin_step(1, log_interval=2, coactivation_interval=0)
    padding = torch.tensor([False, False, False, True])
    # Micro-batches of 3 + 0 + 1 = 4 experts over 3 tokens that count, and of 3 over 2: (4/3 + 3/2) / 2 = 17/12.
    one_rank.add_routing(2, dense((0, 1, 2), (), (3,), (0, 1)), padding, None, 4)
    one_rank.add_routing(2, dense((0, 1), (2,)), None, None, 4)
    one_rank.add_values(2, {"router entropy": 1.0, "importance loss": 0.0, "load loss": 0.5})
    line = one_rank.report(1.0, iteration=2, writer=None, num_layers=2)
    assert " active k: 1.417 | pool size: 4 |" in line and one_rank.mean_k == pytest.approx(17 / 12)
    assert " load loss: 0.25 |" in line and "importance loss" not in line  # a selection has it where it is not zero


def test_a_report_starts_the_next_one_afresh(one_rank):
    step(one_rank, 3.0, iteration=1)
    assert "router entropy: 1 |" in step(one_rank, 1.0, iteration=3)


@pytest.mark.parametrize(("entropy", "warns"), [(0.0, True), (0.069, True), (0.070, False), (1.0, False)])
def test_collapsed_routing_is_said(one_rank, entropy, warns):
    # Both tokens use expert 0. The limit is 5 % of the largest entropy, .05 ln 4 = .0693 nats.
    line = step(one_rank, entropy, iteration=1)
    warning = f"layer 2: router entropy {entropy:.3g} nats, below 0.0693, with one expert in every token's choice"
    assert (warning in line) is warns and ("WARNING" in line) is warns


def test_one_collapsed_layer_among_others_is_said(one_rank):
    one_rank.begin_step(1, log_interval=2, coactivation_interval=0)
    for layer, tokens in ((1, [(0, 1), (2, 3)]), (2, [(0, 1), (0, 1)])):
        one_rank.add_values(layer, {"router entropy": torch.tensor(0.01)})
        one_rank.add_routing(layer, dense(*tokens), None, 2, 2)
    assert "WARNING: layer 2: load entropy 0.693 nats" in one_rank.report(1.0, iteration=2, num_layers=2)


class Writer(dict):
    """Stands for TensorBoard: tag -> (value, iteration)."""

    def add_scalar(self, tag: str, value: float, iteration: int) -> None:
        self[tag] = (value, iteration)


def test_tensorboard_per_layer(one_rank):
    writer = Writer()
    step(one_rank, 1.25, iteration=1, writer=writer, per_layer_logging=True)
    assert writer["emoe/router entropy"] == writer["emoe/router entropy_layer_2"] == (1.25, 2)
    assert "emoe/router entropy_layer_1" not in writer  # a dense layer
    writer.clear()
    step(one_rank, 1.25, iteration=1, writer=writer)
    assert "emoe/dead experts" in writer and not any("layer" in tag for tag in writer)


def test_gradients_are_not_kept(one_rank):
    one_rank.begin_step(1, log_interval=1, coactivation_interval=0)
    one_rank.add_values(2, {"router entropy": torch.tensor(1.0, requires_grad=True) * 2})
    assert not one_rank._sums[2]["router entropy"].requires_grad


def test_the_tracker_takes_the_core_s_place(monkeypatch):
    monkeypatch.setattr(moe_logging, "_MOE_METRICS_TRACKER", None)
    tracker = get_elastic_tracker()
    assert isinstance(tracker, ElasticMetricsTracker)
    assert get_elastic_tracker() is tracker is moe_logging.get_moe_metrics_tracker()


# Two ranks. Layer 1 is dense, layer 2 lies on both ranks (data parallel), layer 3 on the second alone (as with pipeline
# stages): every rank takes part in the one reduction.


def reported(folder: str) -> tuple[list[str], dict]:
    parallel_state.initialize_model_parallel()
    rank = torch.distributed.get_rank()
    writer, lines = Writer(), []
    for iteration in (1, 3):  # the second and the fourth step: the co-activation matrix adds up, also over a restart
        moe_logging.destroy_moe_metrics_tracker()
        tracker = get_elastic_tracker()
        tracker.configure(3, 4, folder)
        tracker.begin_step(iteration, log_interval=2, coactivation_interval=2)
        maps = [dense((0, 1), (0, 1), (2, 3)), dense((0, 3), (0, 1), (0, 1))]
        padding_T = torch.tensor([False, False, bool(rank)])  # the last token of rank 1 is padding
        pool = torch.tensor([[2], [4], [3]]) if rank == 0 else 5
        tracker.add_routing(2, maps[rank], padding_T, 2, pool)
        tracker.add_values(2, {"router entropy": torch.tensor(1.0 + rank)})
        if rank == 1:
            tracker.add_routing(3, dense((1,), (1,), (2,)), None, 1, 1)
            tracker.add_values(3, {"router entropy": torch.tensor(0.5)})
        lines.append(tracker.report(1.0, iteration=iteration + 1, writer=writer, per_layer_logging=True, num_layers=3))
    return lines, dict(writer)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics") / "run"
    return run_ranks(reported, 2, str(folder)), folder


def test_all_ranks_report_the_same(two_ranks):
    (first, second), _ = two_ranks
    assert first == second


def test_means_over_ranks_and_passes(two_ranks):
    ((_, written), _), _ = two_ranks
    # Layer 2: k 2 on both; pools (2 + 4 + 3) / 3 = 3 and 5, mean 4; entropies 1 and 2, mean 1.5. Layer 3 as it is.
    assert written["emoe/active k_layer_2"] == (2.0, 4)
    assert written["emoe/pool size_layer_2"] == (4.0, 4)
    assert written["emoe/router entropy_layer_2"] == (1.5, 4)
    assert written["emoe/active k_layer_3"] == (1.0, 4)
    assert written["emoe/router entropy_layer_3"] == (0.5, 4)
    assert written["emoe/active k"] == (1.5, 4)
    assert "emoe/active k_layer_1" not in written


def test_loads_over_ranks_without_padding(two_ranks):
    ((_, written), _), _ = two_ranks
    # Layer 2, rank 0: experts 0 0 1 1 2 3; rank 1 without its last token: 0 3 0 1. Counts 4 3 1 2, mean 2.5: max 1.6,
    # min .4. Layer 3: counts 0 2 1 0, mean .75: max 2.667, two dead experts.
    assert written["emoe/load max_layer_2"][0] == pytest.approx(1.6)
    assert written["emoe/load min_layer_2"][0] == pytest.approx(0.4)
    assert written["emoe/dead experts_layer_2"][0] == 0
    assert written["emoe/load max_layer_3"][0] == pytest.approx(8 / 3)
    assert written["emoe/dead experts_layer_3"][0] == 2


def test_coactivation_matrix_adds_up(two_ranks):
    (((lines, written), _), folder) = two_ranks
    # One step, layer 2: pairs 0-1 3 times (rank 0 twice, rank 1 once), 2-3 once, 0-3 once: 3 of 6 pairs. Layer 3 has
    # one expert per token: no pair. Mean (1/2 + 0) / 2 = .25. The second step doubles the counts.
    assert lines[1].endswith(" co-activation coverage: 0.2500 |")
    assert written["emoe/co-activation coverage"] == (0.25, 4)
    with safe_open(folder / "coactivation.safetensors", framework="pt") as file:
        assert file.metadata() == {"iteration": "4"}
        assert set(file.keys()) == {"layer.2", "layer.3"}
        # Diagonal: the loads 4 3 1 2, twice.
        assert file.get_tensor("layer.2").tolist() == [[8, 6, 0, 2], [6, 6, 0, 0], [0, 0, 2, 2], [2, 0, 2, 4]]
        assert file.get_tensor("layer.3").diagonal().tolist() == [0, 4, 2, 0]
    assert [path.name for path in folder.iterdir()] == ["coactivation.safetensors"]  # no half-written file is left
