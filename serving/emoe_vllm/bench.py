"""Open-loop load on a running server, by vLLM's own benchmark: tools/serve_bench.py starts this in vLLM's environment.

Each line of stdin is one run as JSON: `url`, `model`, `prompts` (token ids), `output_tokens`, `rate` (requests/s, null:
all at once), `seed` of the arrivals, `body` (further keys of every request). Each is answered with one line of what was
measured, in seconds. Arrivals are a Poisson process. What vLLM's benchmark prints goes to stderr.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import Mapping
from typing import Any

KEYS = ("duration", "completed", "failed", "output_lens", "ttfts", "latencies", "errors")


async def run(asked: Mapping[str, Any]) -> dict[str, Any]:
    """One run: KEYS of vLLM's result, the lists by request in the order of the prompts."""
    import numpy
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    length, rate = asked["output_tokens"], math.inf if asked["rate"] is None else asked["rate"]
    numpy.random.seed(asked["seed"])  # what vLLM draws arrivals from
    found = await benchmark(
        task_type=TaskType.GENERATION,
        endpoint_type="vllm",
        api_url=f"{asked['url']}/v1/completions",
        base_url=asked["url"],
        model_id=asked["model"],
        model_name=asked["model"],
        tokenizer=None,  # the server counts the tokens
        input_requests=[SampleRequest(ids, len(ids), length) for ids in asked["prompts"]],
        logprobs=None,
        request_rate=rate,
        burstiness=1.0,
        disable_tqdm=True,
        num_warmups=0,
        profile=False,
        selected_percentile_metrics=[],
        selected_percentiles=[],
        ignore_eos=True,
        goodput_config_dict={},
        max_concurrency=None,
        lora_modules=None,
        extra_headers=None,
        extra_body=dict(asked["body"]),
        ready_check_timeout_sec=0,
    )
    return {key: found[key] for key in KEYS}


def main() -> None:
    """Until stdin ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            print(json.dumps(asyncio.run(run(json.loads(line)))), file=answers, flush=True)


if __name__ == "__main__":
    main()
