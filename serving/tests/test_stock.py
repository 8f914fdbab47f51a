"""Where nothing is elastic, vLLM with the plugin is vLLM: equal bits. And the elastic layer inside compiled code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import served

BLOCK = {"k_train": 2, "tail_scale": ["0.25"], "k_range": [1, 8]}
HERE = Path(__file__).parent


def run(folder, options, plugins):
    """one_run.py in a process of its own. plugins: VLLM_PLUGINS, None: not set."""
    variables = {key: value for key, value in os.environ.items() if key != "VLLM_PLUGINS"}
    variables |= {"PYTHONPATH": f"{HERE}:{served.ROOT}"} | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
    command = [sys.executable, HERE / "one_run.py", folder, json.dumps(options)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.parametrize("model_type", ["olmoe", "qwen2_moe"])
def test_nothing_changes_where_nothing_is_elastic(model_type, tmp_path):
    plain, elastic = served.save(model_type, tmp_path / "plain"), served.save(model_type, tmp_path / "elastic", BLOCK)
    stock = run(plain, {}, "")
    assert run(plain, {}, None) == stock
    assert run(elastic, {"additional_config": {"emoe": False}}, None) == stock
    found = run(elastic, {"additional_config": {"emoe": {"k": 4}}}, None)
    assert found["scheduler"] == "ElasticScheduler" and found["values"] != stock["values"]


def test_every_budget_in_compiled_code(tmp_path):
    folder = served.save("qwen2_moe", tmp_path / "m", BLOCK)
    reference, prompts, ks = served.Reference(folder), [served.tokens(seed) for seed in (1, 2, 3)], (1, 8, 3)
    with served.engine(folder, {"k": 4}, enforce_eager=False) as llm:
        for prompt in prompts:
            answer, found = served.written(llm, [prompt], served.params(3))[0]
            assert float((found - reference.logprobs(prompt + answer, 4)).abs().max()) < served.TOLERANCE
        mixed = served.written(llm, prompts, [served.params(3, emoe_k=k) for k in ks])
        for prompt, k, (answer, found) in zip(prompts, ks, mixed, strict=True):
            assert float((found - reference.logprobs(prompt + answer, k)).abs().max()) < served.TOLERANCE, k
