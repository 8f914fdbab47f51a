"""Host mode runs the real core: every layout computes what one process computes, a resumed run what one run does.

Runs start from one checkpoint, because the core seeds the weights of each pipeline stage differently.
"""

import contextlib
import functools
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_emoe.host import mode as host_mode
from tests import pretrain_stock
from tests.distributed import REPO, run_ranks, torchrun

MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32 "
    "--num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type aux_loss "
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights"
).split()
LOOP = (
    "--tokenizer-type NullTokenizer --vocab-size 64 --make-vocab-size-divisible-by 1 --mock-data "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --eval-interval 100 --eval-iters 1 --log-interval 1 "
    "--moe-token-dispatcher-type alltoall"
).split()
NO_DROPOUT = ["--hidden-dropout", "0", "--attention-dropout", "0"]
TP2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
EP2 = ["--expert-model-parallel-size", "2"]
PP2 = ["--pipeline-model-parallel-size", "2"]


def run(ranks: int, *flags: str) -> list[dict]:
    return run_ranks(pretrain_stock.train, ranks, [*MODEL, *LOOP, *flags], timeout=120)


def losses(results: list[dict]) -> list[float]:
    """Training losses then validation losses of the rank that has them (the last pipeline stage)."""
    return results[-1]["train"] + results[-1]["valid"]


def assert_same_run(ones: list[dict], others: list[dict]) -> None:
    """Bit-identical: the losses of each rank as far as `others` goes back, and all its final weights."""
    for one, other in zip(ones, others, strict=True):
        assert other["train"] and one["train"][-len(other["train"]) :] == other["train"]
        assert other["valid"] and one["valid"][-len(other["valid"]) :] == other["valid"]
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(weight, other["weights"][name]) for name, weight in one["weights"].items())


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> list[str]:
    """Flags that start three iterations from the weights of a saved one-process run."""
    folder = str(tmp_path_factory.mktemp("start"))
    run(1, *NO_DROPOUT, "--train-iters", "2", "--save", folder, "--save-interval", "2")
    return ["--load", folder, "--finetune", "--exit-on-missing-checkpoint", "--train-iters", "3"]


@pytest.fixture(scope="module")
def reference(start) -> list[float]:
    """The losses of one process: two micro-batches per iteration, then one batch of validation."""
    return losses(run(1, *start, *NO_DROPOUT))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        [*TP2, "--moe-token-dispatcher-type", "allgather"],
        [*TP2, *EP2, "--expert-tensor-parallel-size", "1", "--use-distributed-optimizer"],
        [*PP2],
    ],
    ids=["tensor", "tensor and expert", "pipeline"],
)
def test_a_model_parallel_layout_computes_what_one_process_computes(layout, start, reference):
    assert losses(run(2, *start, *NO_DROPOUT, *layout)) == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_expert_parallel_ranks_compute_the_micro_batches_of_one_process(start, reference):
    ranks = run(2, *start, *NO_DROPOUT, *EP2)
    together = [loss for pair in zip(*(rank["train"] for rank in ranks), strict=True) for loss in pair]
    assert together == pytest.approx(reference[: len(together)], abs=1e-5)
    assert len(together) == 6
    experts = [{name for name in rank["weights"] if "local_experts.3" in name} for rank in ranks]
    assert experts[0] and not any("local_experts.4" in name for name in ranks[0]["weights"])


def test_bf16_follows_fp32_at_its_own_precision(start, reference):
    bf16 = run(1, *start, *NO_DROPOUT, "--bf16")
    assert all(weight.dtype == torch.bfloat16 for weight in bf16[0]["weights"].values() if weight.dim() > 2)
    assert losses(bf16) == pytest.approx(reference, rel=1e-2)
    assert losses(bf16) != reference


@pytest.fixture(scope="module")
def with_dropout(start) -> list[dict]:
    return run(1, *start)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full --recompute-method uniform --recompute-num-layers 1", "selective"])
def test_recomputed_activations_repeat_the_random_numbers(recompute, start, with_dropout, reference):
    assert losses(with_dropout) != reference
    assert_same_run(with_dropout, run(1, *start, "--recompute-granularity", *recompute.split()))


def recomputed(ranks: int, flags: list[str], *modules: str) -> list[float]:
    return losses(run(ranks, *flags, "--recompute-granularity", "selective", "--recompute-modules", *modules))


def test_norms_and_experts_can_be_recomputed(start, with_dropout):
    # Not bit-identical: gradients are summed in another order.
    assert recomputed(1, start, "layernorm", "moe") == pytest.approx(losses(with_dropout), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        [],
        ["--use-distributed-optimizer"],
        ["--use-distributed-optimizer", "--bf16", "--overlap-grad-reduce", "--overlap-param-gather"],
    ],
    ids=["plain", "distributed", "distributed bf16 overlapped"],
)
def test_a_resumed_run_with_dropout_is_bit_identical_to_one_run(optimizer, tmp_path):
    flags = [*EP2, *optimizer, "--train-iters", "12", "--eval-interval", "4"]
    whole = run(2, *flags)
    stopped = run(2, *flags, "--exit-interval", "6", "--save", str(tmp_path), "--save-interval", "6")
    resumed = run(2, *flags, "--load", str(tmp_path), "--exit-on-missing-checkpoint")
    assert [len(rank["train"]) for rank in stopped] == [len(rank["train"]) for rank in resumed] == [6, 6]
    assert stopped[0]["train"] == whole[0]["train"][:6]
    assert_same_run(whole, resumed)


def test_the_model_comes_from_the_checkpoint_where_asked(start, reference):
    not_in_the_checkpoint = MODEL[MODEL.index("--moe-aux-loss-coeff") :][:4]
    flags = [*LOOP, *not_in_the_checkpoint, *start, "--use-checkpoint-args"]
    assert losses(run_ranks(pretrain_stock.train, 1, flags)) == reference


def interrupted(flags: list[str]) -> dict:
    """Rank 1 alone gets SIGTERM before its third forward step."""

    def terminate(recorder: pretrain_stock.Recorder) -> None:
        if os.environ["RANK"] == "1" and len(recorder.train_losses) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    return pretrain_stock.train(flags, terminate)


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_a_checkpoint_and_ends_all(tmp_path):
    flags = [*MODEL, *LOOP, *EP2, "--train-iters", "20", "--save", str(tmp_path), "--save-interval", "50"]
    ranks = run_ranks(interrupted, 2, [*flags, "--exit-signal-handler"])
    assert [len(rank["train"]) for rank in ranks] == [3, 3]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


@pytest.mark.slow
def test_the_script_runs_under_torchrun_and_fills_tensorboard(start, reference, tmp_path):
    script = REPO / "tests" / "pretrain_stock.py"
    flags = [*MODEL, *LOOP, *start, *NO_DROPOUT, *EP2, "--tensorboard-dir", str(tmp_path)]
    output = torchrun(2, script, *flags, timeout=200).stdout
    assert output.count("host mode: megatron-core 0.19") == 1
    printed = [float(loss) for loss in re.findall(r"iteration .* lm loss: (\S+)", output)]
    expected = [sum(reference[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert tensorboard_scalars(tmp_path, "lm loss") == pytest.approx(expected, abs=1e-5)
    assert [printed[0], printed[2]] == pytest.approx([expected[0], expected[2]], abs=1e-5)  # [1]: mean of the first two


def tensorboard_scalars(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.value for event in events.Scalars(tag)]


def random_streams() -> dict[str, bool]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker
    from megatron.core.tensor_parallel.random import _get_all_rng_states, _set_all_rng_states

    def draw_host() -> list:
        shuffled = list(torch.utils.data.RandomSampler(range(20)))  # draws a seed as a data loader does
        return [shuffled, torch.randperm(20).tolist(), torch.rand(3).tolist()]

    def draw_device() -> list:
        drawn = [torch.nn.functional.dropout(torch.ones(20)), torch.empty(3, device="cuda").normal_()]
        return [tensor.tolist() for tensor in [*drawn, torch.rand(3, device="cuda:0"), torch.rand(3, device=0)]]

    def after(preparation) -> tuple[list, list]:
        torch.manual_seed(7)
        preparation()
        return draw_host(), draw_device()

    untouched, after_host, after_device = after(lambda: None), after(draw_host), after(draw_device)
    states = _get_all_rng_states()
    first = draw_host(), draw_device()
    _set_all_rng_states(*states)
    second = draw_host(), draw_device()
    tracker = get_cuda_rng_tracker()
    tracker.add("other", 11)
    device, host = torch.cuda.get_rng_state(), torch.get_rng_state()
    with tracker.fork("other"):
        forked = draw_device()
    given_back = torch.equal(device, torch.cuda.get_rng_state()), torch.equal(host, torch.get_rng_state())
    torch.cuda.manual_seed(11)
    return {
        "host draws move the host stream": untouched[0] != after_host[0],
        "host draws leave the device stream": untouched[1] == after_host[1],
        "device draws move the device stream": untouched[1] != after_device[1],
        "device draws leave the host stream": untouched[0] == after_device[0],
        "the core restores both streams": first == second,
        "the core's tracker forks the device stream": forked == draw_device(),
        "a fork gives both streams back": given_back == (True, True),
    }


def test_host_and_device_random_numbers_come_from_two_streams():
    assert [claim for claim, holds in run_ranks(random_streams, 1)[0].items() if not holds] == []


def device_layer() -> dict[str, bool]:
    x, cuda = torch.ones(2), torch.device("cuda", 0)
    created = [torch.zeros(2, device=name) for name in ("cuda", "cuda:0", cuda, 0)]
    moved = [x.cuda(), x.to("cuda"), x.to(cuda), x.to(device=cuda), x.pin_memory(), torch.ones(2, pin_memory=True)]
    return {
        "created on the CPU": all(tensor.device.type == "cpu" for tensor in created),
        "moved to the CPU": all(tensor.device.type == "cpu" for tensor in moved),
        "a dtype is not a device": x.to(torch.bfloat16).dtype == torch.bfloat16,
        "called as on a GPU": x.type() == "torch.cuda.FloatTensor" and x.type(torch.int64).dtype == torch.int64,
        "not available": not torch.cuda.is_available() and torch.cuda.device_count() == 1,
    }


def test_what_is_meant_for_a_gpu_stays_on_the_cpu():
    assert [claim for claim, holds in run_ranks(device_layer, 1)[0].items() if not holds] == []


COMPILED_BEFORE = """
import torch
from megatron_emoe.host import mode as host_mode

def never(graph, inputs):
    raise AssertionError("compiled")

negate = torch.compile(lambda x: -x, backend=never)
host_mode.enable()
print("negated", negate(torch.ones(2, device="cuda")).tolist())
"""


@pytest.mark.slow
def test_functions_compiled_before_host_mode_run_as_they_are():
    env = os.environ | {"TORCHDYNAMO_DISABLE": "0", "PYTHONPATH": str(REPO)}
    output = subprocess.run([sys.executable, "-c", COMPILED_BEFORE], env=env, capture_output=True, text=True)
    assert "negated [-1.0, -1.0]" in output.stdout, output.stderr[-2000:]


def adam_steps(decoupled: bool, fused: bool) -> tuple[list, list]:
    """Five steps of the optimizer that the core builds, and of torch's own, on the same gradients."""
    from megatron.core import optimizer

    from megatron_emoe.host import adam

    if not fused:
        optimizer.USING_PYTORCH_OPTIMIZER = True  # as on a GPU where neither Apex nor Transformer Engine is
        adam.use_torch_adam_on_a_gpu()
    kwargs = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    own = torch.optim.AdamW if decoupled else torch.optim.Adam
    weights = []
    for build in (functools.partial(optimizer.Adam, adam_w_mode=decoupled), functools.partial(own, fused=fused)):
        generator = torch.Generator().manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(4, generator=generator)) for _ in range(2)]
        built = build([{"params": [p]} for p in parameters] + [{"params": []}], **kwargs)
        for step in range(5):
            for p in parameters[: 2 - step % 2]:  # the second one has no gradient in odd steps
                p.grad = torch.randn(4, generator=generator)
            built.step()
            built.zero_grad()
        weights.append([p.tolist() for p in parameters[:1]])
    return tuple(weights)


@pytest.mark.parametrize(("decoupled", "fused"), [(True, True), (False, True), (True, False)])
def test_adam_is_torchs_adam(decoupled, fused):
    host, own = run_ranks(adam_steps, 1, decoupled, fused)[0]
    assert host == own


def norm_of(kind: str, sharded: bool) -> tuple[list, list]:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = SimpleNamespace(
        normalization=kind,
        sequence_parallel=sharded,
        layernorm_zero_centered_gamma=False,
        persist_layer_norm=False,
        memory_efficient_layer_norm=False,
    )
    norm = WrappedTorchNorm(config=config, hidden_size=2, eps=0.0)
    return norm(torch.tensor([3.0, 5.0])).tolist(), [p.sequence_parallel for p in norm.parameters()]


def test_norms_tell_the_core_whether_their_input_is_a_shard():
    # LayerNorm: mean 4, deviation 1. RMSNorm: root of (9 + 25) / 2 is 4.1231.
    assert run_ranks(norm_of, 1, "LayerNorm", True)[0] == ([-1.0, 1.0], [True, True])
    values, marks = run_ranks(norm_of, 1, "RMSNorm", False)[0]
    assert (values, marks) == (pytest.approx([0.727607, 1.212678], abs=1e-6), [False])


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("--transformer-impl transformer_engine", "in host mode it must be local"),
        ("--distributed-backend nccl", "in host mode it must be gloo"),
        ("--attention-backend flash", "in host mode it must be unfused or local or auto"),
        ("--moe-token-dispatcher-type flex", "in host mode it must be alltoall or allgather"),
        ("--context-parallel-size 2", "in host mode it must be 1"),
        ("--fp8-format e4m3", "not possible in host mode, Transformer Engine computes on GPUs only; leave it out"),
        ("--moe-permute-fusion", "not possible in host mode, the fused kernel runs on GPUs only; leave it out"),
        ("--use-flash-attn", "not possible in host mode, the fused kernel runs on GPUs only; leave it out"),
        ("--tp-comm-overlap", "not possible in host mode, the overlap needs the streams of a GPU; leave it out"),
        (
            "--async-save",
            "not possible in host mode, training would change the tensors while they are written; leave it out",
        ),
        ("--use-megatron-fsdp", "not possible in host mode, FSDP places its shards by CUDA device; leave it out"),
    ],
)
def test_a_flag_that_only_a_gpu_can_serve_is_refused_before_work_starts(words, rule):
    for given in (words.split(), [words.replace(" ", "=")]):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}: {re.escape(rule)}$"):
            host_mode.setup(["--host-mode", "--lr", "1", *given, "--bf16"])
    assert not host_mode.is_on()


def completed(argv: list[str]) -> tuple[list[str], str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        return host_mode.setup(argv), output.getvalue()


def test_defaults_are_added_only_for_flags_that_are_not_given_and_a_gpu_s_kernel_is_left_out():
    given = ["--num-workers=3", "--attention-backend", "local", "--no-rope-fusion", "--seed", "-1"]
    flags, said = run_ranks(completed, 1, [given[0], "--moe-grouped-gemm", *given[1:]])[0]
    line, dropped = said.splitlines(keepends=True)
    assert flags[: len(given)] == given
    added = flags[len(given) :]
    assert [added[added.index(flag) + 1] for flag in ("--transformer-impl", "--distributed-backend")] == [
        "local",
        "gloo",
    ]
    assert "--use-cpu-initialization" in added and "--no-persist-layer-norm" in added
    assert not {"--num-workers", "--attention-backend", "--no-rope-fusion"} & set(added)
    assert re.fullmatch(r"host mode: megatron-core 0\.19\.\d+ on CPU \(gloo\); for .*, not for speed\n", line)
    assert dropped.startswith("host mode: --moe-grouped-gemm is left out, ") and "--moe-grouped-gemm" not in flags


def test_one_rank_says_that_host_mode_is_on():
    assert [bool(line) for _, line in run_ranks(completed, 2, [])] == [True, False]


def printed_help() -> str:
    from megatron.training.arguments import parse_args

    sys.argv = ["pretrain_stock.py", *host_mode.setup(["--help"])]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        parse_args(host_mode.add_arguments)
    return output.getvalue()


def test_help_prints():
    text = run_ranks(printed_help, 1)[0]
    assert "--host-mode " in text and "--moe-router-topk " in text
    assert "%(default)" not in text and "%%" not in text


def beside_a_gpu() -> dict[str, bool]:
    """A process that sees CUDA and has not entered host mode."""
    from megatron.core.datasets import utils

    host_mode._is_on, build = False, utils.compile_helpers
    torch.cuda.is_available = lambda: True
    try:
        host_mode.enable()
        message = ""
    except RuntimeError as error:
        message = str(error)
    unchanged = host_mode.setup(["--fp8-format", "e4m3"])
    on_gpu = not host_mode.is_on() and torch.cuda.is_available()
    flags = host_mode.setup(["--host-mode"])
    return {
        "enable() refuses": message.startswith("host mode: CUDA is present; --host-mode, or enable(force=True)"),
        "setup() changes nothing": unchanged == ["--fp8-format", "e4m3"] and on_gpu,
        "setup() skips the helper's build": utils.compile_helpers is not build and utils.compile_helpers() is None,
        "--host-mode runs on the CPU": host_mode.is_on() and not torch.cuda.is_available() and "gloo" in flags,
    }


def test_where_cuda_is_present_host_mode_needs_to_be_asked_for():
    assert [claim for claim, holds in run_ranks(beside_a_gpu, 1)[0].items() if not holds] == []
