"""A ramp of load: decoding that follows it, against fixed k and fixed 3k. Steps of the three engines take turns.

The number of requests is given step by step, so all engines have the same requests in the same step and differ in k'
alone. The target of the time per token is what fixed k takes at the peak, and a tenth more: that of a server that
was sized for k.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from serve_engines import Engine, Engines

Clock = Callable[[], float]
PHASES = (2, 4, 8, 12, 16, 24, 32, 32, 24, 16, 8, 4, 2)
"""Requests at a time, the same for some steps."""
PROMPT, LENGTH = 8, 24
SLACK = 1.1
LOSSES = {4: 2.2316, 8: 2.2290, 12: 2.2299}
"""Held-out, in nats per token, of the recipe's model of docs/study.md (k = 4): a specialist's loss at each k' and what
the one checkpoint adds to it. They stand in for those of the model that runs here, whose weights are random."""


class Run:
    """One engine under the ramp. running: requests in the last step. steps: seconds of each step, by phase. requests:
    seconds per token of each."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine, self.clock, self.active, self.running = engine, clock, 0, 0
        self.steps: list[list[float]] = []
        self.requests: list[float] = []
        self._tokens: dict[str, list[float]] = {}

    def step(self, wanted: int) -> None:
        for _ in range(wanted - self.active):
            self.engine.add(PROMPT, LENGTH)
            self.active += 1
        self.running = self.active
        start = self.clock()
        outputs = self.engine.step()
        seconds = self.clock() - start
        self.steps[-1].append(seconds)
        for output in outputs:
            self._tokens.setdefault(output.request_id, []).append(seconds)
            if output.finished:
                self.active -= 1
                # The first token ends the reading of the prompt, and is not counted in the time per token.
                self.requests.append(statistics.mean(self._tokens.pop(output.request_id)[1:]))


def ramp(engines: Engines, steps: int, clock: Clock) -> dict[str, Any]:
    """Of each phase the requests, the mean k' that was followed and the median step of each engine (ms); of each engine
    the share of requests within the target and the mean loss."""
    k, most = engines.shape.ks[1], engines.shape.ks[-1]
    chosen = {"follow": engines.elastic, f"k' = {k}": engines.stock[k], f"k' = {most}": engines.stock[most]}
    runs = {name: Run(engine, clock) for name, engine in chosen.items()}
    phases = [_phase(engines, runs, wanted, steps) for wanted in PHASES]
    for run in runs.values():
        run.engine.drain()
    peak = phases[PHASES.index(max(PHASES))]["ms"][f"k' = {k}"]
    shares = {name: statistics.mean(1000 * each <= SLACK * peak for each in run.requests) for name, run in runs.items()}
    followed = {budget: sum(phase["tokens"].get(budget, 0) for phase in phases) for budget in LOSSES}
    losses = {f"k' = {budget}": LOSSES[budget] for budget in (k, most)}
    losses["follow"] = sum(LOSSES[budget] * count for budget, count in followed.items()) / sum(followed.values())
    return {"target_ms": SLACK * peak, "phases": phases, "within": shares, "losses": losses, "tokens": followed}


def _phase(engines: Engines, runs: dict[str, Run], wanted: int, steps: int) -> dict[str, Any]:
    before = _tokens(engines)
    for run in runs.values():
        run.steps.append([])
    names, active = list(runs), []
    for step in range(steps):
        for name in names[step % 3 :] + names[: step % 3]:
            runs[name].step(wanted)
        active.append(runs["follow"].running)
    tokens = {k: count - before.get(k, 0) for k, count in _tokens(engines).items()}
    ms = {name: 1000 * statistics.median(run.steps[-1]) for name, run in runs.items()}
    mean = sum(k * count for k, count in tokens.items()) / max(sum(tokens.values()), 1)
    return {"requests": statistics.mean(active), "k": mean, "ms": ms, "tokens": tokens}


def _tokens(engines: Engines) -> dict[int, int]:
    """Tokens that were written at each k' with the plugin."""
    import emoe_vllm

    return dict(map(tuple, emoe_vllm.status(engines.elastic.llm)["decode"]))


def lines(result: dict[str, Any]) -> Sequence[str]:
    """Two tables: by phase, and what it comes to."""
    names = list(result["phases"][0]["ms"])
    rows = [
        f"| {phase['requests']:.0f} | {phase['k']:.1f} | "
        + " | ".join(f"{phase['ms'][name]:.1f}" for name in names)
        + " |"
        for phase in result["phases"]
    ]
    return [
        "| requests | mean k' followed | " + " | ".join(f"{name}, ms" for name in names) + " |",
        "| ---: | ---: |" + " ---: |" * len(names),
        *rows,
        "",
        f"| target {result['target_ms']:.1f} ms per token | requests within it | mean loss of what was written |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {100 * result['within'][name]:.0f} % | {result['losses'][name]:.4f} |" for name in names),
    ]
