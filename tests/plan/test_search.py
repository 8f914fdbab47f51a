"""The search, its measure, and tools/plan_job.py as a user calls it."""

import contextlib
import json
import re
import shlex
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from megatron_emoe.plan.given import Given, read_given
from megatron_emoe.plan.search import MARGIN, Machine
from megatron_emoe.plan.traffic import Transfer, sent_by_kind
from tests.distributed import REPO, run_ranks
from tests.sweeps import Answer, run_tool
from tests.tiny import BASE, flags

RECIPE = REPO / "examples/recipe.args"


def plan(*words: object) -> Answer:
    """tools/plan_job.py with these words, in a process of its own."""
    return run_ranks(_plan, 1, [str(word) for word in words])[0]


def _plan(words: list[str]) -> Answer:
    import torch

    torch.distributed.destroy_process_group()
    with nothing_kept():
        return run_tool("plan_job", *words)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Inside, plans ask Megatron anew, and leave nothing in the user's folder."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", XDG_CACHE_HOME=folder):
        yield


def found(*words: object) -> dict[str, Any]:
    answer = plan(*words, "--json")
    assert answer.status == 0, answer.err
    return json.loads(answer.out)


def test_bytes_that_leave_a_rank():
    assert Transfer("tensor parallel", "all-gather", 4, 800).sent == 600
    assert Transfer("data parallel", "reduce-scatter", 2, 800).sent == 400
    assert Transfer("data parallel", "all-reduce", 4, 800).sent == 1200  # scattered, then gathered
    assert Transfer("pipeline", "send", 2, 800).sent == 800
    both = [Transfer("all-to-all", "all-to-all", 8, 800), Transfer("all-to-all", "all-gather", 8, 80)]
    assert sent_by_kind(both) == {"all-to-all": 770, "data parallel": 0, "tensor parallel": 0, "pipeline": 0}


def test_flops_steps_and_hours_of_a_given_layout():
    layout = ["--tp", 1, "--pp", 1, "--ep", 8, "--micro-batch", 1, "--recompute", "moe"]
    what = found("--model", "olmoe-7b", "--gpus", 8, *layout, "--tokens", "1e9", "--mfu", 0.4, "--gpu-tflops", 1000)
    assert what["k"] == {"expected": 8, "largest": 8} and what["runners_up"] == []
    # By hand, in a layer: attention 4 x 2048 ** 2, router 2048 x 64, experts 8 x 3 x 2048 x 1024; head 2048 x 50304;
    # scores and values 2 x 2048 for each of (4096 + 1) / 2 tokens of context. Twice for multiply-adds, three passes.
    layer = 4 * 2048**2 + 2048 * 64 + 8 * 3 * 2048 * 1024 + 2 * 2048 * 4097 / 2
    assert what["flops_per_token"] == 6 * (16 * layer + 2048 * 50304)
    assert what["tokens_per_step"] == 256 * 4096 and what["steps"] == 954  # 953.7
    assert what["hours"] == pytest.approx(954 * what["flops_per_step"] / (8 * 1000e12 * 0.4) / 3600)
    assert what["sent_bytes_per_step"][0]["tensor parallel"] == 0
    # Dispatch and combine, forward, again, and backward: 8 rows of 2048 bf16 twice and a weight in fp32; 32 micro-
    # batches of 4096 tokens, 16 layers. Counts of 64 experts from 8 ranks in int64, forward and again.
    rows = 32 * 16 * 3 * 4096 * 8 * (2 * 2 * 2048 + 4)
    counts = 32 * 16 * 2 * 8 * 64 * 8
    assert what["sent_bytes_per_step"][0]["all-to-all"] == pytest.approx((rows + counts) * 7 / 8, rel=1e-12)


def test_the_recipe_decides_k():
    what = found("--model", "ernie-4.5-21b", "--gpus", 16, "--recipe", RECIPE)
    assert what["k"] == {"expected": 0.5 * 6 + 0.5 * (3 + 12 + 18) / 3, "largest": 18}
    fullest = max(stage["total"] for stage in what["memory_bytes"])
    assert fullest <= what["usable_bytes"] == (80 - Machine().reserve) * 2**30
    assert any(stage["larger_k"] for stage in what["memory_bytes"]) or what["layout"]["recompute"] != "none"


def test_one_gpu_of_80_gib_needs_lean_gradients_and_moments():
    job = ["--model", "olmoe-7b", "--gpus", 1, "--recipe", RECIPE]
    refused = plan(*job, "--optimizer-state", "bf16")
    assert refused.status == 2 and "77.3 of them" not in refused.err and "no layout fits 1 GPUs" in refused.err
    lean = found(*job, "--optimizer-state", "bf16-grads")
    parameters = 6_919_161_856 + 16 * 4 * 24  # of OLMoE-1B-7B, and a scale for every layer, each of four k, and rank
    (memory,) = lean["memory_bytes"]
    assert (memory["weights"], memory["gradients"]) == (2 * parameters, 2 * parameters)
    assert memory["optimizer"] == 6 * parameters and lean["layout"]["recompute"] == "full"
    assert {"--use-precision-aware-optimizer", "--main-grads-dtype"} < set(lean["flags"])


def test_a_model_in_fp32_is_planned_in_bf16_once_that_is_asked_for(tmp_path):
    text = (REPO / "examples/models/olmoe_1b_7b.args").read_text()
    (tmp_path / "model.args").write_text(text.replace("\n--bf16", ""))
    job = ["--model", tmp_path / "model.args", "--gpus", 8, "--ep", 8]
    refused = plan(*job)
    assert refused.status == 2 and "--precision bf16 trains it so" in refused.err
    asked, given = (found(*words, "--precision", "bf16") for words in (job, ["--model", "olmoe-7b", *job[2:]]))
    assert asked["flags"] == ["--bf16", *given["flags"]] and asked["memory_bytes"] == given["memory_bytes"]


def test_a_tiny_model_repeats_nothing_and_a_proposal_leaves_a_margin(tmp_path):
    (tmp_path / "model.args").write_text(shlex.join(words_of_a_tiny_model()))
    tiny = found("--model", tmp_path / "model.args", "--gpus", 1)
    assert tiny["layout"]["recompute"] == "none" and tiny["layout"]["seq"] == 16
    full = found("--model", "ernie-4.5-21b", "--gpus", 16, "--recipe", RECIPE)
    assert max(stage["total"] for stage in full["memory_bytes"]) <= (1 - MARGIN) * full["usable_bytes"]
    steps = [other["step_to_best"] for other in full["runners_up"]]
    assert steps == sorted(steps) and len(steps) == 4


def words_of_a_tiny_model() -> list[str]:
    chosen = ("tokenizer", "micro_batch", "global_batch", "seq_length", "lr", "train", "eval", "log", "seed", "split")
    left_out = {name: None for name in BASE if name.startswith(chosen)}
    return flags(bf16=True, mock_data=None, **left_out)


def test_the_flags_of_a_run_give_its_length_layout_and_elastic_settings(tmp_path):
    run = tmp_path / "training.args"
    run.write_text(f"@{REPO}/slurm/train.args --micro-batch-size 2 --emoe-k-grid 4 12 --lr 1 --seq-length 2048 --bf16")
    job = ["--model", "olmoe-7b", "--gpus", 8, "--recipe", RECIPE, "--training", run]
    what = found(*job, "--precision", "fp8")
    assert what["layout"]["fp8"] and "--fp8-format" in what["flags"]
    assert (what["steps"], what["layout"]["micro_batch"], what["layout"]["seq"]) == (5000, 2, 2048)  # as in train.args
    assert what["k"] == {"expected": 0.5 * 8 + 0.5 * (4 + 12) / 2, "largest": 12}
    assert what["tokens_per_step"] == 256 * 2048
    run.write_text("--train-samples 100 --train-samples 300 --global-batch-size 3 --bf16 --emoe-k-weights 1 2 --lr 1")
    given = Given({"global_batch": 3}, samples=300, elastic=("--emoe-k-weights", "1", "2"), precision="bf16")
    assert read_given(str(run)) == given
    assert given.tokens(3, 100) == 30_000
    run.write_text("--bf16 --fp8-format=hybrid")
    assert read_given(str(run)) == Given({}, precision="fp8")
    run.write_text("--train-iters 0")
    refused = plan(*job)
    assert refused == Answer(2, "", "plan_job.py: error: --train-iters 0: must be at least 1\n")


@pytest.mark.slow
def test_a_person_reads_layout_memory_traffic_time_and_runners_up():
    answer = plan("--model", "olmoe-7b", "--gpus", 8)
    assert answer.status == 0, answer.err
    for part in (
        "parameters per rank",
        "optimizer (its share)",
        "sent per rank and step",
        "hours at",
        "divisions that",
    ):
        assert part in answer.out
    rows = re.findall(r"^([* ]) TP.* ([0-9.]+) GiB  x ([0-9.]+)$", answer.out, re.MULTILINE)
    steps = [float(step) for *_, step in rows]
    assert len(rows) == 5 and steps == sorted(steps) and [mark for mark, *_ in rows].count("*") == 1
    flags = answer.out.splitlines()[-1].removeprefix("flags: ")
    assert plan("--model", "olmoe-7b", "--gpus", 8, "--print-flags") == Answer(0, flags + "\n", "")
    assert {"--use-distributed-optimizer", "--expert-model-parallel-size", "4096"} <= set(shlex.split(flags))


MODELS = ("olmoe-7b", "qwen1.5-moe-14b", "deepseek-v2-lite-16b", "ernie-4.5-21b")
LATER_MODELS = ("moonlight-16b", "qwen3-30b", "mixtral-47b", "granite-1b")


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [8, 16, 32])
@pytest.mark.parametrize("memory", [80, 141])
def test_each_model_has_a_layout_that_megatron_takes(gpus, memory):
    assert run_ranks(accepted, 1, gpus, memory, MODELS)[0] == dict.fromkeys(MODELS, gpus)


@pytest.mark.slow
def test_the_later_models_have_layouts_too():
    assert run_ranks(accepted, 1, 32, 80, LATER_MODELS)[0] == dict.fromkeys(LATER_MODELS, 32)


def accepted(gpus: int, memory: int, models: tuple[str, ...]) -> dict[str, int]:
    """The world size that Megatron's own checks find right for the flags of each model's plan."""
    from megatron_emoe.plan.model import read_model
    from megatron_emoe.settings import flag_files
    from megatron_emoe.training import arguments

    worlds = {}
    for name in models:
        words = ["--model", name, "--gpus", gpus, "--gpu-memory", memory, "--recipe", RECIPE, "--print-flags"]
        with nothing_kept():
            answer = run_tool("plan_job", *words)
        assert answer.status == 0, (name, answer.err)
        flags = [*read_model(name, None, None).words, f"@{RECIPE}", *shlex.split(answer.out)]
        args = arguments.completed(arguments.parsed(flag_files.expand(flags)), gpus)
        worlds[name] = args.data_parallel_size * args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    return worlds


REFUSED = [
    (["--gpus", 8, "--ep", 8, "--model", "qwen1.5-moe-14b"], "--ep 8: must divide the model's 60 experts"),
    (["--gpus", 8, "--tp", 8, "--model", "ernie-4.5-21b"], "--tp 8: must divide the model's"),
    (["--gpus", 6, "--pp", 4, "--model", "olmoe-7b"], "must divide --gpus 6"),
    (["--gpus", 8, "--seq", 8192, "--model", "olmoe-7b"], "8192"),
    (["--gpus", 8, "--micro-batch", 3, "--model", "olmoe-7b"], "--global-batch 256: must be a multiple of"),
    (["--gpus", 1, "--model", "olmoe-7b"], "no layout fits 1 GPUs; the smallest, TP1 PP1 EP1 DP1"),
    (
        [
            "--gpus",
            8,
            "--tp",
            1,
            "--pp",
            1,
            "--ep",
            1,
            "--micro-batch",
            8,
            "--recompute",
            "none",
            "--model",
            "olmoe-7b",
        ],
        "--gpu-memory 80 less --reserve 8 is 72",
    ),
    (
        ["--gpus", 7, "--pp", 1, "--model", "ernie-4.5-21b"],
        "--global-batch 256: must be a multiple of --micro-batch 1 x 7",
    ),
    (["--gpus", 1000, "--model", "olmoe-7b"], "--global-batch 256: must be a multiple of --micro-batch 1 x 1000"),
    (["--gpus", 8, "--model", "gpt-5"], "--model gpt-5: neither a flag file nor one of olmoe-7b"),
    (["--gpus", 8, "--model", "olmoe-7b", "--recipe", "missing.args"], "no flag file"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("words", "rule"), REFUSED, ids=[rule for _, rule in REFUSED])
def test_impossible_plans_end_with_status_2_and_the_rule(words, rule):
    answer = plan(*words)
    assert answer.status == 2 and answer.out == ""
    assert answer.err.startswith("plan_job.py: error: ") and answer.err.count("\n") == 1
    assert rule in answer.err


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("--tensor-model-parallel-size 2", "the plan chooses it; give --tp"),
        (
            f"@{RECIPE} --emoe-distill-coeff 0.5",
            "--emoe-distill-coeff 0.5: a plan does not know the teacher's forward pass",
        ),
        ("--emoe-k-schedule uniform", "--emoe-k-schedule uniform: needs --emoe-k-max"),
    ],
)
def test_flags_that_a_plan_cannot_use(line, rule, tmp_path):
    file = tmp_path / "recipe.args"
    file.write_text(line)
    answer = plan("--model", "olmoe-7b", "--gpus", 8, "--recipe", file)
    assert answer.status == 2 and rule in answer.err, answer.err


@pytest.mark.parametrize(
    "words",
    [["--gpus", 0], ["--gpus", 8, "--mfu", 1.5], ["--gpus", 8, "--json", "--check"], ["--gpus", 8, "--tp", "x"]],
)
def test_wrong_words_are_usage_errors(words):
    assert plan("--model", "olmoe-7b", *words).status == 2


def test_check_builds_every_rank_of_the_layout():
    answer = plan("--model", "olmoe-7b", "--gpus", 8, "--tp", 2, "--pp", 2, "--ep", 2, "--check")
    assert answer.status == 0, answer.out + answer.err
    lines = answer.out.splitlines()
    assert len(lines) == 2 + 4 and all(line.endswith(", equal") for line in lines[1:-1])
    assert lines[-1] == "all parameter counts are as planned"
