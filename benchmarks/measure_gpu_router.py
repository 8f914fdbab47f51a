"""The routing kernel against the bytes that it must move and against its reference, on one device. See bench_gpu.py.

    python benchmarks/measure_gpu_router.py CELL.json RESULT.json

CELL: tokens (a list), samples, calls in each sample, copied (bytes of the copy that gives the bandwidth), device.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_emoe.routing import kernel as router_kernel
from megatron_emoe.routing import selection
from megatron_emoe.routing.kernel import RoutingRule

CELL, OUT = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
DEVICE = torch.device(CELL["device"])
EXPERTS, SEED = 64, 1
RULE = RoutingRule("softmax", k=8, pool_max=24, normalize=False, rank_by_scores=True)  # OLMoE's, pools up to 24


def samples(work: Callable[[], Any]) -> list[float]:
    """Seconds of one call, in each sample: the mean over calls one behind the other, so that launches overlap."""
    for _ in range(3):
        work()
    found = []
    for _ in range(CELL["samples"]):
        wait()
        start = time.perf_counter()
        for _ in range(CELL["calls"]):
            work()
        wait()
        found.append((time.perf_counter() - start) / CELL["calls"])
    return found


def wait() -> None:
    """Sync: until the device has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of the fastest sample of a copy."""
    source = torch.ones(CELL["copied"] // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(samples(lambda: target.copy_(source)))


def reference(logits_TE: Tensor, u_TP: Tensor) -> Tensor:
    """The same routing by selection.py; probabilities alone."""
    scores_TE = selection.expert_scores(logits_TE, RULE.score_function)
    with torch.no_grad():
        ranked_TP = selection.rank_experts(scores_TE, RULE.pool_max, k=RULE.k, num_groups=None, group_topk=None)
        sizes_T1 = selection.draw_pool_sizes(u_TP[:, :1], RULE.k, RULE.pool_max)
        indices_TK = selection.sample_from_pool(ranked_TP, RULE.k, sizes_T1, u_TP[:, 1:])
    weighing = {"score_function": RULE.score_function, "normalize": RULE.normalize, "scale": None, "tail": None}
    weights_TK = selection.combine_weights(logits_TE, scores_TE, indices_TK, **weighing)
    return selection.to_dense(weights_TK, indices_TK, logits_TE)[0]


def passes(tokens: int) -> dict[str, dict[str, Any]]:
    """Forward alone, and with the backward pass: bytes, seconds of kernel and reference."""
    generator = torch.Generator().manual_seed(SEED)
    logits_TE = torch.randn(tokens, EXPERTS, generator=generator).to(DEVICE).requires_grad_()
    grad_TE = torch.randn(tokens, EXPERTS, generator=generator).to(DEVICE)
    u_TP = selection.uniform_numbers(tokens, RULE.pool_max + 1, SEED, DEVICE)
    forward, backward = router_kernel.bytes_moved(tokens, EXPERTS, RULE.pool_max, logits_TE.dtype)

    def kernel(logits_TE: Tensor) -> Tensor:
        return router_kernel.route(logits_TE, RULE, None, u_TP).probs_TE

    both = {"kernel": kernel, "reference": lambda logits_TE: reference(logits_TE, u_TP)}
    close = torch.isclose(both["kernel"](logits_TE), both["reference"](logits_TE), atol=1e-6).float().mean()
    assert close > 0.999, f"kernel and reference agree on {close:.2%} only"  # equal scores may be ranked either way
    once, twice = {}, {}
    for name, work in both.items():
        once[name] = samples(lambda work=work: work(logits_TE.detach()))
        twice[name] = samples(lambda work=work: torch.autograd.grad(work(logits_TE), logits_TE, grad_TE))
    return {
        f"forward, {tokens} tokens": {"bytes": forward, **once},
        f"forward + backward, {tokens} tokens": {"bytes": forward + backward, **twice},
    }


def main() -> None:
    if reason := router_kernel.why_not(torch.empty(1, EXPERTS, device=DEVICE)):
        OUT.write_text(json.dumps({"copy": copy_bandwidth(), "skipped": reason}))
        return
    rows = {name: row for tokens in CELL["tokens"] for name, row in passes(tokens).items()}
    OUT.write_text(json.dumps({"copy": copy_bandwidth(), "passes": rows}))


if __name__ == "__main__":
    main()
