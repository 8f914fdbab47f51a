"""Training runs of pretrain_emoe.py on two expert-parallel ranks: elasticity off, every loss, evaluation, FLOPs."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, Run, arguments, flags, start, train

pytestmark = pytest.mark.slow

EP2 = {"expert_model_parallel_size": 2}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
SEQUENCE_AND_Z = {
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_z_loss_coeff": 0.01,
}
SIGMOID = {
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-2,
}
MICRO_BATCH_TOKENS = 2 * 16


@pytest.mark.parametrize(
    "settings",
    [AUX, SIGMOID | SEQUENCE_AND_Z],
    ids=["aux-loss", "sigmoid-bias-seq-aux-loss-z-loss"],
)
def test_with_everything_off_twenty_steps_are_bit_identical_to_the_core_s(settings):
    words = flags(**EP2 | settings | {"train_iters": 20, "global_batch_size": 4})
    for ours, stock in zip(run_ranks(train, 2, words), run_ranks(train, 2, words, True), strict=True):
        assert len(ours.losses) == 20 and ours.losses == stock.losses
        assert ours.losses[-1] < ours.losses[0] - 0.3  # it did learn
        for mine, theirs in zip(ours.gradients, stock.gradients, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert ours.weights.keys() == stock.weights.keys()
        assert all(torch.equal(ours.weights[name], stock.weights[name]) for name in ours.weights)


def tokens_per_expert(runs: list[Run]) -> dict[tuple[int, int], Tensor]:
    """(step, layer) -> tokens of each expert over all ranks and micro-batches, in training."""
    counts: dict[tuple[int, int], Tensor] = defaultdict(lambda: torch.zeros(8))
    for run in runs:
        for route in run.routes:
            if route.training:
                counts[route.step, route.layer] += route.map_TE.sum(0)
    return counts


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_the_expert_bias_moves_by_its_rate_towards_the_experts_with_less_load(function):
    elastic = {"sigmoid": COACTIVATION, "softmax": COACTIVATION | PREFIX | {"emoe_selection": "coactivation"}}[function]
    balance = {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 1e-2],
        "moe_z_loss_coeff": 1e-3,
        "moe_router_score_function": function,
        "moe_router_pre_softmax": function == "softmax",
    }
    runs = run_ranks(train, 2, flags(**EP2 | SIGMOID | balance | elastic | {"train_iters": 5}))
    counts = tokens_per_expert(runs)
    for layer in (1, 2):
        bias = torch.zeros(8)
        for step in range(5):
            load = counts[step, layer]
            assert load.sum() % (8 * 16) == 0 and load.sum() > 0
            bias += 1e-2 * torch.sign(load.mean() - load)
        for run in runs:
            torch.testing.assert_close(run.weights[f"decoder.layers.{layer - 1}.mlp.router.expert_bias"], bias)
    assert all(torch.tensor(run.losses).isfinite().all() for run in runs)


def test_multi_token_prediction_layers_sample_too():
    settings = {"mtp_num_layers": 1, "moe_z_loss_coeff": 1e-3, "moe_shared_expert_intermediate_size": 8}
    runs = run_ranks(train, 2, flags(**EP2 | AUX | COACTIVATION | settings))
    rows: dict[tuple[int, int], int] = defaultdict(int)
    for run in runs:
        assert len(run.losses) == 4 * 2 and torch.tensor(run.losses).isfinite().all()
        for seen in run.rows:
            rows[seen.step, seen.layer] += seen.rows
        for route in run.routes:
            ranks = route.probs_TE.argsort(dim=1, descending=True)
            assert (route.map_TE.sum(1) == 2).all() and ranks.shape == (MICRO_BATCH_TOKENS, 8)
    assert set(rows) == {(step, layer) for step in range(4) for layer in (1, 2, 3)}
    assert set(rows.values()) == {8 * 16 * 2}  # sequences x length x k
    maps = {route.layer: route.map_TE for route in runs[0].routes if route.step == 0}
    assert not torch.equal(maps[2], maps[3])
    assert "mtp_1 loss" in runs[1].log and "hierarchical router loss" in runs[1].log


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> tuple[list[Run], Path]:
    """A run with evaluation at steps 2 and 4, then on the validation and the test set, at four k'."""
    folder = tmp_path_factory.mktemp("evaluated")
    settings = {
        "eval_interval": 2,
        "eval_iters": 2,
        "emoe_eval_k": [1, 2, 5, 8],
        "emoe_coactivation_interval": 2,
        "log_interval": 2,
        "tensorboard_dir": str(folder),
        "moe_per_layer_logging": True,
    }
    return run_ranks(train, 2, flags(**EP2 | AUX | COACTIVATION | settings)), folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation_k.jsonl").read_text().splitlines()]


PASSES = {"iteration 2": 0, "iteration 4": 5, "on test set": 11}
"""Where an evaluation begins that has five passes over its batches: the ordinary one, then k' = 1, 2, 5, 8. At the end
Megatron evaluates the last iteration once more, in pass 10."""


def test_every_evaluation_is_repeated_at_each_k_on_the_same_batches(evaluated):
    runs, folder = evaluated
    written = records(folder)
    assert [(record["iteration"], record["split"]) for record in written] == [(2, "valid"), (4, "valid"), (4, "test")]
    batches = 2 * 8 // 2 // 2  # iterations x global batch / micro batch / ranks
    for run in runs:
        assert len(run.valid_losses) == (3 * 5 + 1) * batches
    for first, record in zip(PASSES.values(), written, strict=True):
        at_k = []
        for position in range(5):
            begin = (first + position) * batches
            at_k.append([run.valid_losses[begin : begin + batches] for run in runs])
        assert at_k[2] == at_k[0]  # k' = k: bit by bit the ordinary evaluation
        assert list(record["loss"]) == ["1", "2", "5", "8"]
        for k, losses in zip(record["loss"], at_k[1:], strict=True):
            assert record["loss"][k] == pytest.approx(torch.tensor(losses).mean().item(), rel=1e-6)
        assert len(set(record["loss"].values())) == 4


def test_the_value_at_the_model_s_k_is_the_validation_loss_that_the_core_reports(evaluated):
    runs, folder = evaluated
    lines = [line for line in runs[1].log.splitlines() if "validation loss at" in line and "lm loss value" in line]
    assert len(lines) == 4 and "on validation set" in lines.pop(2)
    for record, place, line in zip(records(folder), PASSES, lines, strict=True):
        assert place in line and f"lm loss value: {record['loss']['2']:.6E}" in line
    assert runs[1].log.count("k'=8:") == 3


def test_evaluation_dispatches_tokens_times_k(evaluated):
    rows = [seen for run in evaluated[0] for seen in run.rows if not seen.training]
    per_evaluation = 2 * 8 * 16 * 2  # iterations x global batch x length x layers
    assert sum(seen.rows for seen in rows) == per_evaluation * (4 * 2 + 3 * (1 + 2 + 5 + 8))


def test_tensorboard_has_each_k_and_the_elastic_metrics(evaluated):
    runs, folder = evaluated
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for record in records(folder):
        name = {"valid": "validation", "test": "test"}[record["split"]]
        for k, loss in record["loss"].items():
            values = [value for step, value in scalars[f"emoe/{name} loss at k={k}"] if step == record["iteration"]]
            assert values == pytest.approx([loss], rel=1e-6)
    assert scalars["emoe/active k"] == [(2, 2.0), (4, 2.0)]
    assert all(2.5 < value < 5.5 for _, value in scalars["emoe/pool size"])  # mean of {2, ..., 6} is 4
    counts = tokens_per_expert(runs)
    for layer in (1, 2):
        for step, value in scalars[f"emoe/load max_layer_{layer}"]:
            load = counts[step - 1, layer]
            assert value == pytest.approx((load.max() / load.mean()).item())
    assert scalars["emoe/router entropy"][0][1] == pytest.approx(2.05, abs=0.1)  # log 8 = 2.08: a fresh router
    hierarchical = scalars["emoe/hierarchical router loss"][0][1] - scalars["emoe/router entropy"][0][1]
    assert hierarchical == pytest.approx(-2.0794, abs=1e-4)


def test_the_co_activation_matrix_counts_the_pairs_that_were_dispatched(evaluated):
    runs, folder = evaluated
    matrices = load_file(folder / "coactivation.safetensors")
    for layer in (1, 2):
        wanted = torch.zeros(8, 8)
        for route in (route for run in runs for route in run.routes if route.training and route.layer == layer):
            if route.step in (1, 3):  # every second iteration
                used = route.map_TE.float()
                wanted += used.t() @ used
        assert torch.equal(matrices[f"layer.{layer}"].float(), wanted)
        assert wanted.diagonal().sum() == 2 * 8 * 16 * 2


def count_flops(changes: dict[str, Any], iterations: list[int]) -> tuple[list[float], dict[int, float]]:
    """FLOPs of a step as the log counts them, by iteration; and as the core counts them for a fixed k, by k."""
    from copy import copy

    from megatron.training import training as core_training

    stock = core_training.num_floating_point_operations
    args = arguments(flags(**changes))
    start()
    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.training.loop import ElasticLoop

    ElasticLoop(args, elastic_model_config(args).transformer)
    reported = []
    for args.curr_iteration in iterations:
        reported.append(core_training.num_floating_point_operations(args, 8))
    fixed = {}
    for k in range(1, 9):
        other = copy(args)
        other.moe_router_topk = k
        fixed[k] = stock(other, 8)
    return reported, fixed


def test_flops_are_counted_at_the_expected_k():
    weighted = {"emoe_selection": "prefix", "emoe_k_schedule": "weighted", "emoe_k_min": 1, "emoe_k_max": 4}
    (reported,), fixed = run_ranks(count_flops, 1, weighted | {"emoe_k_weights": [1, 0, 0, 3]}, [5])[0]
    # Forward and backward (3) of multiply-adds (2) in gate, up and down (3 x 32 x 16), for 8 x 16 tokens in 2 layers.
    one_more_expert = 3 * 2 * (3 * 32 * 16) * (8 * 16) * 2
    assert fixed[4] - fixed[3] == one_more_expert
    assert reported == pytest.approx(fixed[1] + 2.25 * one_more_expert)  # E[k] = (1 + 3 x 4) / 4 = 3.25


def test_flops_follow_a_ramp_and_the_default_or_smaller_schedule():
    ramp = {"emoe_k_schedule": "ramp", "emoe_k_min": 1, "emoe_k_max": 5, "emoe_k_ramp_iters": 8}
    reported, fixed = run_ranks(count_flops, 1, COACTIVATION | ramp, [0, 4, 8, 100])[0]
    assert reported == [fixed[1], fixed[3], fixed[5], fixed[5]]
    smaller = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-smaller", "emoe_k_min": 1}
    (reported,), fixed = run_ranks(count_flops, 1, smaller | {"moe_router_topk": 3}, [0])[0]
    assert reported == pytest.approx(0.8 * fixed[3] + 0.1 * fixed[2] + 0.1 * fixed[1])


LENGTH, USED = 16, 10
EVERY_LOSS = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.1],
    "moe_z_loss_coeff": 0.01,
    "emoe_hr_loss_coeff": 0.01,
}
RECIPE = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-larger", "emoe_tail_scale": ["0.25"]}


def fill_up() -> None:
    """From now on the end of every sequence is padding, and marked as such."""
    _change_batches(lambda batch: _filled(batch["tokens"], batch["loss_mask"]))


def cut_off() -> None:
    """From now on the same sequences come without it."""
    _change_batches(
        lambda batch: (
            {name: batch[name][:, :USED].contiguous() for name in ("tokens", "labels", "loss_mask", "position_ids")}
            | {"attention_mask": batch["attention_mask"][:, :, :USED, :USED]}
        )
    )


def _filled(tokens: Tensor, loss_mask: Tensor) -> dict[str, Tensor]:
    padding = torch.arange(LENGTH).expand_as(tokens) >= USED
    return {"tokens": tokens.masked_fill(padding, 3), "loss_mask": loss_mask * ~padding, "padding_mask": padding}


def _change_batches(change: Any) -> None:
    from megatron_emoe.training import loop

    read = loop.get_batch

    def changed(*place: Any) -> dict[str, Any]:
        batch = read(*place)
        return batch | change(batch)

    loop.get_batch = changed


def logged_values(run: Run) -> list[dict[str, float]]:
    """The numbers of each step's line, without times and throughput."""
    lines = [line.split("|")[1:-1] for line in run.log.splitlines() if "lm loss:" in line]
    parts = [[part.partition(":") for part in line if "time" not in part and "TFLOP" not in part] for line in lines]
    return [{name.strip(): float(value) for name, _, value in line} for line in parts]


@pytest.mark.parametrize("settings", [SIGMOID | RECIPE, AUX | COACTIVATION], ids=["bias, recipe", "coactivation"])
def test_padding_counts_in_no_loss_no_load_and_no_bias(settings):
    words = flags(**EVERY_LOSS | settings | {"train_iters": 3, "lr": 1e-3})
    ((filled,), (cut,)) = (run_ranks(train, 1, words, False, change) for change in (fill_up, cut_off))
    assert [route.map_TE.shape[0] for route in (filled.routes[0], cut.routes[0])] == [2 * LENGTH, 2 * USED]
    steps = list(zip(logged_values(filled), logged_values(cut), strict=True))
    assert len(steps) == 3
    for values, wanted in steps:
        assert values.keys() == wanted.keys() > {"load max", "router entropy", "z_loss", "grad norm"}
        for name, value in wanted.items():
            assert values[name] == pytest.approx(value, rel=1e-3), name
    for name, weight in cut.weights.items():
        torch.testing.assert_close(filled.weights[name], weight, rtol=1e-4, atol=1e-5, msg=name)


class Nothing(torch.nn.Module):
    """A model that computes nothing."""

    vp_stage = None

    def forward(self, **inputs: Any) -> Tensor:
        return torch.zeros(1)


def flops_of_packed_documents(starts: list[list[int]]) -> list[float]:
    """FLOPs of a step as the log counts them: of micro-batches with documents from these places, and of whole ones."""
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.training import training as core_training

    args = arguments(flags())
    start()
    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.training import loop

    running, model = loop.ElasticLoop(args, elastic_model_config(args).transformer), Nothing()
    nothing = dict.fromkeys(["tokens", "position_ids", "attention_mask", "labels", "loss_mask", "padding_mask"])
    for cu_seqlens in starts:
        packed = PackedSeqParams(cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32))
        loop.get_batch = lambda *_, packed=packed: nothing | {"packed_seq_params": packed}
        for training in (True, False):
            running.forward(None, model.train(training))
    tokens, squares = core_training.consume_seqlen_stats_in_iteration()
    return [
        core_training.num_floating_point_operations(
            args, 8, seqlen_squared_sum_in_batch=squares, total_real_tokens_in_batch=tokens
        ),
        core_training.num_floating_point_operations(args, 8),
    ]


def test_flops_of_packed_documents_are_those_of_attention_within_them():
    packed, whole = run_ranks(flops_of_packed_documents, 1, [[0, 4, 16, 32], [0, 32], [0, 16, 17, 32], [0, 5, 32]])[0]
    squares = sum(length**2 for length in (4, 12, 16, 32, 16, 1, 15, 5, 27))
    # Forward and backward (3) of multiply-adds (2) of scores and values (2), half of them masked; width 32, 2 layers.
    assert packed - whole == 3 * 2 * 2 / 2 * 32 * 2 * (squares - 8 * 16**2)
