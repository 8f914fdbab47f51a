"""A batch that grows: --rampup-batch-size is the step schedule that it stands for, and neither ends a run midway."""

from argparse import Namespace
from collections import Counter

import pytest

from megatron_emoe.training.batch_schedule import check_batch_schedule, ramp_schedule, settle_ramp
from tests.distributed import run_ranks
from tests.tiny import flags, train

GROWING = {"train_iters": None, "train_samples": 30}


@pytest.mark.slow
def test_a_ramp_takes_the_same_batches_and_losses_as_the_core_s_step_schedule():
    """6 sequences more over 12, in three parts of 4: 2, from 4 on 4, from 8 on 6, from 12 on 8 (16 tokens each)."""
    ramp = {"rampup_batch_size": [2, 2, 12], "global_batch_size": 8}
    steps = {"step_batch_size_schedule": "0:2 64:4 128:6 192:8", "global_batch_size": None, "eval_global_batch_size": 8}
    ours, stock = ([*flags(**GROWING | each)] for each in (ramp, steps))
    ((mine,), (theirs,)) = run_ranks(train, 1, ours), run_ranks(train, 1, stock, True)
    batches = Counter(route.step for route in mine.routes if route.layer == 1 and route.training)
    assert [2 * batches[step] for step in sorted(batches)] == [2, 2, 4, 6, 8, 8]  # micro-batches of 2
    assert mine.losses == theirs.losses


def arguments(**changes) -> Namespace:
    settled = {
        "rampup_batch_size": None,
        "step_batch_size_schedule": None,
        "global_batch_size": 8,
        "seq_length": 16,
        "micro_batch_size": 2,
        "data_parallel_size": 1,
        "gtp_weight_remat_size": 1,
        "decrease_batch_size_if_needed": False,
        "train_samples": 96,
        "skip_train": False,
    }
    return Namespace(**settled | changes)


def test_parts_that_are_no_whole_samples_begin_with_the_next():
    """Three parts of 10 samples begin at 0, 3.3, 6.7, 10."""
    assert ramp_schedule([2, 2, 10], 8, seq_length=1) == "0:2 4:4 7:6 10:8"


REFUSED_RAMPS = {
    (("2", "2", "16"), "global_batch_size", None): "needs --global-batch-size, which is not given",
    (("2", "4", "16"), "seq_length", 16): "must lead from START at least 1 in whole steps of INCREMENT to "
    "--global-batch-size 8",
    (("0", "4", "16"), "seq_length", 16): "must lead from START at least 1 in whole steps of INCREMENT to "
    "--global-batch-size 8",
    (("2", "2", "2"), "seq_length", 16): "must have a sample for each of its 3 increments at least",
}


@pytest.mark.parametrize("ramp", REFUSED_RAMPS)
def test_a_ramp_that_leads_nowhere_is_refused(ramp):
    words, name, value = ramp
    with pytest.raises(ValueError) as refusal:
        settle_ramp(arguments(rampup_batch_size=list(words), **{name: value}))
    assert str(refusal.value) == f"--rampup-batch-size {' '.join(words)}: {REFUSED_RAMPS[ramp]}"


REFUSED_SCHEDULES = {
    "0:4 64:2": "its batch must grow, 2 follows 4",
    "0:2 64:5": "its batch of 5 must be a multiple of 2, a micro-batch on each rank",
    "16:4": "first schedule entry must have threshold 0, got 1",
    "many": 'Invalid schedule entry "many". Expected format: "THRESHOLD:BATCH_SIZE"',
}


@pytest.mark.parametrize("schedule", REFUSED_SCHEDULES)
def test_a_schedule_that_would_end_a_run_midway_is_refused(schedule):
    with pytest.raises(ValueError) as refusal:
        check_batch_schedule(arguments(step_batch_size_schedule=schedule), begins=True)
    assert str(refusal.value) == f"--step-batch-size-schedule '{schedule}': {REFUSED_SCHEDULES[schedule]}"


@pytest.mark.parametrize(("samples", "whole"), [(28, "22 or 30"), (3, "2 or 4"), (1, "2")])
def test_a_run_ends_with_a_whole_batch(samples, whole):
    """Batches of 2 2 4 6 8 8 end at 2 4 8 14 22 30."""
    asked = arguments(step_batch_size_schedule="0:2 64:4 128:6 192:8", train_samples=samples)
    with pytest.raises(ValueError) as refusal:
        check_batch_schedule(asked, begins=True)
    rule = f"must end with a whole batch of the schedule, such as {whole}"
    assert str(refusal.value) == f"--train-samples {samples}: {rule}"


def test_a_run_that_goes_on_on_more_ranks_may_have_had_smaller_batches():
    check_batch_schedule(
        arguments(step_batch_size_schedule="0:2 64:8", data_parallel_size=4, train_samples=12), begins=False
    )


def test_a_run_of_a_number_of_steps_has_no_growing_batch():
    asked = arguments(rampup_batch_size=["2", "2", "16"], train_samples=None)
    settle_ramp(asked)
    rule = "needs --train-samples in place of --train-iters, as steps have no fixed batch"
    with pytest.raises(ValueError, match=f"^--rampup-batch-size 2 2 16: {rule}$"):
        check_batch_schedule(asked, begins=True)
