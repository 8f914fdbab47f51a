"""What a plan says: text for a person, one object for a program, one line of flags for a job script."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_emoe.plan.layout import layout_flags
from megatron_emoe.plan.memory import GIB
from megatron_emoe.plan.search import Plan
from megatron_emoe.plan.traffic import KINDS, sent_by_kind

if TYPE_CHECKING:
    from megatron_emoe.plan.check import CheckedRank

RUNNERS_UP = 4


def flags_line(plan: Plan) -> str:
    """Megatron's flags for the layout, as a shell takes them."""
    return shlex.join(_flags(plan))


def _flags(plan: Plan) -> list[str]:
    return [*plan.model.added, *layout_flags(plan.model.args, plan.layout)]


def text(plans: Sequence[Plan], tokens: float) -> list[str]:
    """The best plan in full, and the next few in a line each."""
    best = plans[0]
    return [
        *_head(best),
        "",
        *_parameters(best),
        "",
        *_memory(best),
        "",
        *_traffic(best),
        "",
        *_time(best, tokens),
        "",
        *_runners_up(plans),
        f"flags: {flags_line(best)}",
    ]


def _head(plan: Plan) -> list[str]:
    layout, model = plan.layout, plan.model
    cause = "fp8" if layout.fp8 else "bf16"
    return [
        f"{model.name} on {layout.gpus} GPUs, {layout.gpus_per_node} a node, {cause}: {layout.name()}",
        f"{layout.global_batch} sequences of {layout.seq} tokens a step; micro-batches of {layout.micro_batch}, "
        f"{layout.micro_batches} a rank; recompute {layout.recompute}",
        f"active experts: E[k] = {model.expected_k:g}, k_max = {model.largest_k} of {model.args.num_experts} "
        f"(--moe-router-topk {model.args.moe_router_topk})",
    ]


def _parameters(plan: Plan) -> list[str]:
    rows = [f"{'parameters per rank':<34}{'dense':>16}{'expert':>16}{'all':>16}"]
    for stage, count in enumerate(plan.parameters):
        rows.append(f"  stage {stage:<26}{count.dense:>16,}{count.expert:>16,}{count.total:>16,}")
    return rows


def _memory(plan: Plan) -> list[str]:
    stage = plan.fullest
    memory, machine = plan.memory[stage], plan.machine
    rows = [f"memory per rank, GiB (stage {stage}, the fullest)"]
    rows += [f"  {name:<38}{size / GIB:>8.2f}" for name, size in memory.parts().items() if size]
    rows.append(f"  {'sum':<38}{memory.total / GIB:>8.2f}")
    rows.append(f"  {'of --gpu-memory less --reserve':<38}{machine.usable / GIB:>8.2f}")
    return rows


def _traffic(plan: Plan) -> list[str]:
    stage = _busiest(plan)
    sent = sent_by_kind(plan.transfers[stage])
    rows = [f"sent per rank and step, GB (stage {stage}, the busiest)"]
    rows += [f"  {kind:<38}{sent[kind] / 1e9:>8.2f}" for kind in KINDS if sent[kind]]
    return rows if len(rows) > 1 else ["nothing is sent"]


def _busiest(plan: Plan) -> int:
    return max(range(plan.layout.pp), key=lambda stage: sum(sent_by_kind(plan.transfers[stage]).values()))


def _time(plan: Plan, tokens: float) -> list[str]:
    machine = plan.machine
    return [
        f"FLOPs at E[k] (forward and backward): {plan.flops_per_token / 1e9:.4g} G per token, "
        f"{plan.flops_per_step / 1e15:.4g} P per step of {plan.tokens_per_step:,} tokens",
        f"{tokens:.4g} tokens: {plan.steps(tokens):,} steps, {plan.hours(tokens):.3g} hours at "
        f"an MFU of {machine.mfu:g} of {machine.tflops:g} TFLOP/s (--mfu, --gpu-tflops: stated, not predicted)",
    ]


def _runners_up(plans: Sequence[Plan]) -> list[str]:
    if len(plans) == 1:
        return []
    title = (
        f"of {len(plans)} divisions that fit, by estimated step (for ranking only: docs/planning.md); * is proposed:"
    )
    listed = sorted(plans[: RUNNERS_UP + 1], key=lambda plan: plan.estimate)
    return [title, *(_row(plan, plans[0]) for plan in listed), ""]


def _row(plan: Plan, best: Plan) -> str:
    layout, mark = plan.layout, "*" if plan is best else " "
    return (
        f"{mark} {layout.name():<28} micro-batch {layout.micro_batch}, recompute {layout.recompute:<5}"
        f"{plan.memory[plan.fullest].total / GIB:>7.1f} GiB  x {plan.estimate / best.estimate:.2f}"
    )


def as_json(plans: Sequence[Plan], tokens: float) -> dict[str, Any]:
    """Everything of the best plan, and the runners-up. Bytes, FLOPs, hours."""
    best, layout = plans[0], plans[0].layout
    return {
        "model": best.model.name,
        "layout": vars(layout) | {"dp": layout.dp, "edp": layout.edp, "micro_batches": layout.micro_batches},
        "flags": _flags(best),
        "k": {"expected": best.model.expected_k, "largest": best.model.largest_k},
        "parameters": [{"dense": count.dense, "expert": count.expert} for count in best.parameters],
        "memory_bytes": [vars(memory) | {"total": memory.total} for memory in best.memory],
        "usable_bytes": best.machine.usable,
        "sent_bytes_per_step": [sent_by_kind(transfers) for transfers in best.transfers],
        "flops_per_token": best.flops_per_token,
        "flops_per_step": best.flops_per_step,
        "tokens_per_step": best.tokens_per_step,
        "steps": best.steps(tokens),
        "hours": best.hours(tokens),
        "mfu": best.machine.mfu,
        "runners_up": [_short(plan, best) for plan in plans[1 : RUNNERS_UP + 1]],
    }


def _short(plan: Plan, best: Plan) -> dict[str, Any]:
    total = plan.memory[plan.fullest].total
    return vars(plan.layout) | {"memory_bytes": total, "step_to_best": plan.estimate / best.estimate}


def checked_line(checked: CheckedRank) -> str:
    """One rank of --check."""
    planned, built = checked.planned, checked.built
    verdict = "equal" if checked.agrees else f"DIFFERENT: planned {planned.dense:,} and {planned.expert:,}"
    place = f"rank {checked.rank:>3}: stage {checked.pp}, expert rank {checked.ep}, tensor rank {checked.tp}"
    return f"{place}: built {built.dense:,} dense and {built.expert:,} expert parameters, {verdict}"
