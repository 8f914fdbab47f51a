"""A global batch that grows: Megatron's --step-batch-size-schedule, and --rampup-batch-size, which is turned into one.

Megatron-Core 0.19 parses --rampup-batch-size and reads it nowhere: such a run would have its full batch from the first
step on.
"""

from __future__ import annotations

from argparse import Namespace

from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator


def settle_ramp(args: Namespace) -> None:
    """Let --rampup-batch-size START INCREMENT SAMPLES (and --global-batch-size, its end) be a step schedule of `args`.

    The batch is START + i INCREMENT once i of the equal parts of SAMPLES are consumed, as Megatron had it before 0.19.

    Raises:
        ValueError: a ramp that does not end in --global-batch-size, or beside a flag that it cannot be combined with.
    """
    if args.rampup_batch_size is None:
        return
    ramp = [int(word) for word in args.rampup_batch_size]
    given = f"--rampup-batch-size {' '.join(map(str, ramp))}"
    _refuse_ramp(args, ramp, given)
    args.step_batch_size_schedule = ramp_schedule(ramp, args.global_batch_size, args.seq_length)
    args._is_global_batch_size_explicitly_specified = False  # else the core refuses the two together


def _refuse_ramp(args: Namespace, ramp: list[int], given: str) -> None:
    for name in ("global_batch_size", "seq_length"):
        if getattr(args, name) is None:
            raise ValueError(f"{given}: needs --{name.replace('_', '-')}, which is not given")
    if args.step_batch_size_schedule is not None:
        raise ValueError(f"{given} cannot be combined with --step-batch-size-schedule: one schedule is enough")
    start, increment, samples = ramp
    growth = args.global_batch_size - start
    if start < 1 or increment < 1 or growth < increment or growth % increment:
        rule = f"from START at least 1 in whole steps of INCREMENT to --global-batch-size {args.global_batch_size}"
        raise ValueError(f"{given}: must lead {rule}")
    if samples < growth // increment:
        raise ValueError(f"{given}: must have a sample for each of its {growth // increment} increments at least")


def ramp_schedule(ramp: list[int], global_batch_size: int, seq_length: int) -> str:
    """The step schedule "TOKENS:BATCH ..." of START, INCREMENT, SAMPLES: sequences, of seq_length tokens each."""
    start, increment, samples = ramp
    parts = (global_batch_size - start) // increment
    begins = [-(-part * samples // parts) for part in range(parts + 1)]  # rounded up
    return " ".join(f"{begin * seq_length}:{start + part * increment}" for part, begin in enumerate(begins))


def check_batch_schedule(args: Namespace, begins: bool) -> None:
    """Refuse a schedule that would end a run in the middle. args: completed by validate_args; begins: from step 0 on.

    Raises:
        ValueError: no schedule by its form, a batch that shrinks or that the ranks cannot share, or a run whose length
            is in steps: Megatron then takes data and learning rate for the smallest batch.
    """
    if args.step_batch_size_schedule is None:
        return
    given = f"--step-batch-size-schedule '{args.step_batch_size_schedule}'"
    if args.rampup_batch_size is not None:
        given = f"--rampup-batch-size {' '.join(map(str, args.rampup_batch_size))}"
    if args.train_samples is None and not args.skip_train:
        raise ValueError(f"{given}: needs --train-samples in place of --train-iters, as steps have no fixed batch")
    ranks = args.data_parallel_size * args.gtp_weight_remat_size
    steps = _steps(args, given, ranks)
    batches = [batch for _, batch in steps]
    for before, batch in zip([0, *batches], batches, strict=False):
        if batch <= before:
            raise ValueError(f"{given}: its batch must grow, {batch} follows {before}")
        share = args.micro_batch_size * ranks
        if begins and batch % share:
            raise ValueError(f"{given}: its batch of {batch} must be a multiple of {share}, a micro-batch on each rank")
    _check_length(args.train_samples, steps)


def _check_length(samples: int | None, steps: list[tuple[int, int]]) -> None:
    """The core rounds the number of steps up, and the last batch may then find too few sequences."""
    if not samples:
        return
    before = after = 0
    for (_, batch), end in zip(steps, [*(begin for begin, _ in steps[1:]), samples], strict=True):
        count = -(-max(0, min(end, samples) - after) // batch)  # steps, rounded up
        if count:
            before, after = after + (count - 1) * batch, after + count * batch
    if after != samples:
        whole = " or ".join(str(end) for end in (before, after) if end)
        raise ValueError(f"--train-samples {samples}: must end with a whole batch of the schedule, such as {whole}")


def _steps(args: Namespace, given: str, ranks: int) -> list[tuple[int, int]]:
    """(samples consumed, batch) of each step, as the core reads them; no rank -1 is there to print them."""
    decrease, schedule = args.decrease_batch_size_if_needed, args.step_batch_size_schedule
    try:
        return StepBatchsizeNumMicroBatchesCalculator(
            args.micro_batch_size, ranks, decrease, rank=-1, schedule=schedule, seq_length=args.seq_length
        ).schedule
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{given}: {error}") from error
