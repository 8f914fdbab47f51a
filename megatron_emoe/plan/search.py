"""A plan: a layout with its memory, traffic, FLOPs and time; and the search for the best layout that fits.

An estimate of the step's time ranks layouts and does nothing else (hours follow from --mfu): the model's FLOPs and
those of recomputation at half of the GPU's peak, the routed experts' slower the fewer rows an expert has; stretched by
the pipeline's bubble and its longest stage; all bytes sent, at the links' bandwidths and nothing hidden; half a
millisecond for each layer and micro-batch. The estimate is no finer than 5 %, and the memory no finer than that either:
where layouts leave so much of it free, the others are not proposed. Of those within 5 % of the shortest the best is the
one with the fewest tensor and pipeline ranks, then the one that recomputes least, then the one that needs least memory.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from megatron_emoe.model.flops import flops_per_token, is_gated, lora_products
from megatron_emoe.plan.layout import Layout, Recompute, broken_rules, stage_layers
from megatron_emoe.plan.memory import GIB, Memory, stage_memory
from megatron_emoe.plan.model import PlannedModel
from megatron_emoe.plan.parameters import Parameters, padded_vocabulary, stage_parameters
from megatron_emoe.plan.traffic import Transfer, stage_transfers

KERNEL_SHARE = 0.5  # of the peak, by matrix products alone
HALF_SPEED_ROWS = 256  # of an expert in a micro-batch, at which its products run at half of that
CLOSE = 1.05  # estimates within this factor are equal
MARGIN = 0.05  # of the usable memory, that a proposed layout leaves free where any does
LAYER_SECONDS = 5e-4  # of one layer and micro-batch, forward and backward, whatever its size
MICRO_BATCHES = (1, 2, 4, 8)
TENSOR_RANKS = (1, 2, 4, 8)
MOST_GPUS = 2**17
"""Of a job: more than any machine has, and few enough to try every divisor."""
RECOMPUTATIONS: tuple[Recompute, ...] = ("none", "moe", "full")


@dataclass(frozen=True)
class Machine:
    """gpu_memory, reserve: GiB of a GPU, and of them what is left to context, NCCL, workspaces and fragmentation.
    tflops: peak of a GPU. mfu: the share of it that hours are stated for. node_gbs, network_gbs: GB/s that a GPU sends
    within a node and out of it. imbalance: rows of the busiest rank's experts, as a multiple of the mean."""

    gpu_memory: float = 80.0
    reserve: float = 8.0
    tflops: float = 989.0
    mfu: float = 0.3
    node_gbs: float = 300.0
    network_gbs: float = 40.0
    imbalance: float = 1.25

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return (self.gpu_memory - self.reserve) * GIB


@dataclass(frozen=True)
class Plan:
    """A layout of a model on a machine, and all that follows. Lists are by pipeline stage."""

    model: PlannedModel
    layout: Layout
    machine: Machine

    @cached_property
    def parameters(self) -> list[Parameters]:
        """Of a rank of each stage."""
        return [stage_parameters(self.model.args, self.layout, stage) for stage in range(self.layout.pp)]

    @cached_property
    def memory(self) -> list[Memory]:
        """Of a rank of each stage."""
        stages = range(self.layout.pp)
        return [stage_memory(self.model, self.layout, stage, self.machine.imbalance) for stage in stages]

    @cached_property
    def transfers(self) -> list[list[Transfer]]:
        """Of a rank of each stage, at E[k]."""
        k = self.model.expected_k
        return [stage_transfers(self.model.args, self.layout, stage, k) for stage in range(self.layout.pp)]

    @property
    def fullest(self) -> int:
        """The stage that needs most memory."""
        return max(range(self.layout.pp), key=lambda stage: self.memory[stage].total)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room."""
        return self.memory[self.fullest].total <= self.machine.usable

    @property
    def has_margin(self) -> bool:
        """Whether the fullest rank leaves some of it free: no number here was measured on a GPU."""
        return self.memory[self.fullest].total <= (1 - MARGIN) * self.machine.usable

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.layout.global_batch * self.layout.seq

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of one token at E[k]: three times the forward pass, for each pass of a micro-batch; twice that
        of frozen weights; and a teacher's forward pass. What recomputation repeats is not among them."""
        taught = self._forward_at(self.model.args.moe_router_topk) if self.model.args.emoe_teacher else 0
        return (3 * self._forward - self._frozen) * self.model.passes + taught

    @property
    def flops_per_step(self) -> float:
        """Of all ranks together."""
        return self.flops_per_token * self.tokens_per_step

    def steps(self, tokens: float) -> int:
        """Steps until `tokens` tokens are seen."""
        return math.ceil(tokens / self.tokens_per_step)

    def hours(self, tokens: float) -> float:
        """Hours for `tokens` tokens at the stated MFU."""
        rate = self.layout.gpus * self.machine.tflops * 1e12 * self.machine.mfu
        return self.steps(tokens) * self.flops_per_step / rate / 3600

    @cached_property
    def estimate(self) -> float:
        """Seconds of a step, for ranking only (see the module's text)."""
        compute = (
            self.flops_per_step * self._recomputed / (self.layout.gpus * self.machine.tflops * 1e12 * KERNEL_SHARE)
        )
        stretch = self._longest_stage * (1 + (self.layout.pp - 1) / self.layout.micro_batches)
        layers = max(len(stage) for stage in self._stages)
        fixed = LAYER_SECONDS * layers * self.model.passes * (self.layout.micro_batches + self.layout.pp - 1)
        return compute * stretch + fixed + max(self._seconds(transfers) for transfers in self.transfers)

    @property
    def _stages(self) -> list[range]:
        return stage_layers(self.model.args.num_layers, self.layout.pp)

    @cached_property
    def _forward(self) -> float:
        return self._forward_at(self.model.expected_k)

    def _forward_at(self, k: float) -> float:
        args = _at(self.model.args, self.layout)
        flops = flops_per_token(args, [k] * len(self.model.moe_layers))
        assert flops is not None, "read_model() refuses flags that are not counted"
        return flops

    @property
    def _frozen(self) -> float:
        """Forward FLOPs of one token in a base under low-rank experts, whose weights need no gradient."""
        args = self.model.args
        if args.emoe_lora_experts is None:
            return 0.0
        trained = lora_products(args) + args.hidden_size * args.emoe_lora_experts
        return self._forward - 2.0 * args.num_layers * trained

    @property
    def _recomputed(self) -> float:
        """All FLOPs as a multiple of those of forward and backward pass."""
        if self.layout.recompute == "none":
            return 1.0
        repeated = self._forward if self.layout.recompute == "full" else _expert_flops(self.model, shared=True)
        return 1 + repeated / (3 * self._forward)

    @property
    def _slowed(self) -> float:
        """Time of the products, as a multiple of that with experts of very many rows each."""
        args, layout = self.model.args, self.layout
        if args.emoe_lora_experts is not None:
            return 1.0
        rows = layout.tokens * layout.ep * layout.etp * self.model.expected_k / args.num_experts
        share = _expert_flops(self.model, shared=False) / self._forward
        return 1 + share * HALF_SPEED_ROWS / rows

    @property
    def _longest_stage(self) -> float:
        """FLOPs of the longest stage, as a multiple of the mean; the head counts to the last stage."""
        args = self.model.args
        head = 2.0 * args.hidden_size * padded_vocabulary(args, self.layout.tp)
        layer = (self._forward - head) / args.num_layers
        flops = [layer * len(stage) for stage in self._stages]
        flops[-1] += head
        return max(flops) * self.layout.pp / sum(flops)

    def _seconds(self, transfers: Sequence[Transfer]) -> float:
        """Time of what a rank sends, one after the other."""
        speeds = {False: self.machine.node_gbs, True: self.machine.network_gbs}
        return sum(transfer.sent / (speeds[transfer.crosses] * 1e9) for transfer in transfers)


def _at(args: Namespace, layout: Layout) -> Namespace:
    padded = padded_vocabulary(args, layout.tp)
    return Namespace(**vars(args) | {"seq_length": layout.seq, "padded_vocab_size": padded})


def _expert_flops(model: PlannedModel, *, shared: bool) -> float:
    """Forward FLOPs per token of the routed experts, and of the shared ones if asked."""
    args = model.args
    width = model.expected_k * args.moe_ffn_hidden_size
    width += (args.moe_shared_expert_intermediate_size or 0) if shared else 0
    return 2.0 * len(model.moe_layers) * (3 if is_gated(args) else 2) * args.hidden_size * width


@dataclass(frozen=True)
class Wanted:
    """What the user fixed; None: the search chooses. etp None: every rank holds whole experts."""

    gpus: int
    gpus_per_node: int
    global_batch: int
    seq: int
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    micro_batch: int | None = None
    recompute: Recompute | None = None
    fp8: bool = False
    state: str = "fp32"

    def layouts(self) -> Iterator[Layout]:
        """Every layout to look at, possible or not."""
        divisors = [n for n in range(1, self.gpus + 1) if self.gpus % n == 0]
        tps = [n for n in TENSOR_RANKS if n <= min(self.gpus, self.gpus_per_node)]
        choices = (
            tps if self.tp is None else [self.tp],
            divisors if self.pp is None else [self.pp],
            divisors if self.ep is None else [self.ep],
            MICRO_BATCHES if self.micro_batch is None else [self.micro_batch],
            RECOMPUTATIONS if self.recompute is None else [self.recompute],
        )
        for tp, pp, ep, micro_batch, recompute in product(*choices):
            batch = (micro_batch, self.global_batch, self.seq)
            kind = (recompute, self.fp8, self.state)
            yield Layout(self.gpus, self.gpus_per_node, tp, pp, ep, self.etp or 1, *batch, *kind)


def propose(model: PlannedModel, wanted: Wanted, machine: Machine) -> list[Plan]:
    """The plans that fit: the proposal, then the others by estimate; of each division of the model only the best batch
    and recomputation.

    Raises:
        ValueError: nothing is possible, or nothing fits: the rule, or what the smallest lacks.
    """
    possible, broken = [], []
    for layout in wanted.layouts():
        rules = list(broken_rules(model.args, layout))
        if rules:
            broken.append(rules)
        else:
            possible.append(Plan(model, layout, machine))
    if not possible:
        raise ValueError(min(broken, key=len)[0])  # of the layout that comes closest, the simplest where several do
    fitting = [plan for plan in possible if plan.fits]
    if not fitting:
        raise ValueError(_too_large(possible))
    return _ranked(fitting)


def _ranked(plans: Sequence[Plan]) -> list[Plan]:
    """The proposal, then the best of each other division, by estimate: those that leave a margin, where any does."""
    roomy = [plan for plan in plans if plan.has_margin] or plans
    shortest = min(plan.estimate for plan in roomy)
    proposal = min((plan for plan in roomy if plan.estimate <= CLOSE * shortest), key=_complexity)
    best: dict[tuple[int, ...], Plan] = {}
    for plan in [proposal, *sorted(plans, key=lambda plan: (not plan.has_margin, plan.estimate))]:
        best.setdefault((plan.layout.tp, plan.layout.pp, plan.layout.ep), plan)
    _, *others = best.values()
    return [proposal, *sorted(others, key=lambda plan: plan.estimate)]


def _complexity(plan: Plan) -> tuple[float, ...]:
    """What decides between layouts that are equally fast."""
    layout = plan.layout
    return layout.tp * layout.pp, RECOMPUTATIONS.index(layout.recompute), plan.memory[plan.fullest].total


def _too_large(possible: Sequence[Plan]) -> str:
    """What the plan that comes closest lacks."""
    plan = min(possible, key=lambda plan: plan.memory[plan.fullest].total)
    memory, machine, layout = plan.memory[plan.fullest], plan.machine, plan.layout
    name, size = max(memory.parts().items(), key=lambda part: part[1])
    which = layout.name() if len(possible) == 1 else f"no layout fits {layout.gpus} GPUs; the smallest, {layout.name()}"
    return (
        f"{which} (--micro-batch {layout.micro_batch}, recompute {layout.recompute}): needs "
        f"{memory.total / GIB:.1f} GiB on the ranks of stage {plan.fullest}, {size / GIB:.1f} of them {name}; "
        f"--gpu-memory {machine.gpu_memory:g} less --reserve {machine.reserve:g} is {machine.usable / GIB:g}"
    )
