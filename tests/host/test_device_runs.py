"""The comparisons of tests/gpu, run in host mode: what can go wrong in them without a GPU goes wrong here first."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.device_runs import in_process, on, trained, waits
from tests.distributed import REPO
from tests.gpu_comparisons import (
    ELASTIC,
    FIRST_STEP,
    FOUR_STEPS,
    MICRO_BATCHES,
    equal_runs,
    largest_difference,
    one_layer,
    run_words,
    wait_words,
)


@pytest.mark.slow
def test_a_run_in_a_new_interpreter_is_the_run_of_a_rank():
    words = run_words("cpu", **ELASTIC["coactivation"])
    ours, theirs = in_process("cpu", trained, words, False, True), on("cpu", trained, words, False, True)
    equal_runs(ours, theirs)


@pytest.mark.slow
def test_elastic_off_is_stock_and_elastic_on_is_not():
    words = run_words("cpu", deterministic_mode=True)
    stock = on("cpu", trained, words, True)
    equal_runs(on("cpu", trained, words), stock)
    with pytest.raises(AssertionError):
        equal_runs(on("cpu", trained, run_words("cpu", **ELASTIC["coactivation"])), stock)


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["coactivation", "recipe"])
def test_the_bounds_between_devices_hold_rounding_and_no_more(elastic):
    words = run_words("cpu", **ELASTIC[elastic])
    exact = on("cpu", trained, words, False, True)
    rounded, wrong = (on("cpu", trained, words, False, True, nudge) for nudge in (1e-7, 1e-2))
    first, all_steps = largest_difference(exact, rounded)
    assert first < FIRST_STEP and all_steps < FOUR_STEPS
    first, all_steps = largest_difference(exact, wrong)
    assert first > FIRST_STEP and all_steps > FOUR_STEPS


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["coactivation", "recipe"])
def test_an_elastic_step_reads_no_more_numbers_than_a_stock_step(elastic):
    found = on("cpu", waits, wait_words("cpu", **ELASTIC[elastic]))
    assert found["elastic"] == found["stock"] != Counter(), found


def waits_of_a_router_that_counts(words: list[str]) -> dict[str, Counter]:
    from megatron_emoe.routing.moe_layer import ElasticMoELayer

    preprocess = ElasticMoELayer.preprocess

    def counting(self, hidden_states, probs, routing_map):
        assert routing_map.sum().item() > 0
        return preprocess(self, hidden_states, probs, routing_map)

    ElasticMoELayer.preprocess = counting
    return waits(words)


@pytest.mark.slow
def test_a_wait_in_a_layer_would_be_seen():
    found = on("cpu", waits_of_a_router_that_counts, wait_words("cpu", **ELASTIC["coactivation"]))
    more = found["elastic"] - found["stock"]
    assert more == {"aten::_local_scalar_dense": 2 * MICRO_BATCHES}  # one for each layer and micro-batch


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_layer_alone_runs_forward_and_backward(dispatcher):
    for elastic in (None, *ELASTIC.values()):
        assert on("cpu", one_layer, elastic, dispatcher) == []


MORE_THAN_A_GPU_MACHINE_NEEDS = ("pydantic", "lm_eval", "transformers", "matplotlib")
MARK = "\npytestmark = pytest.mark.gpu"


@pytest.mark.slow
def test_the_gpu_tests_are_found_with_torch_megatron_and_pytest_alone(tmp_path):
    for name in MORE_THAN_A_GPU_MACHINE_NEEDS:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on this machine')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    engine = {"tests/gpu/test_fp8.py"}  # found where there is Transformer Engine
    marked = [path for path in (REPO / "tests").rglob("test_*.py") if MARK in path.read_text()]
    assert found - engine == {str(path.relative_to(REPO)) for path in marked} - engine != set()
