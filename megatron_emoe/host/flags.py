"""The flags that host mode needs, and those that only a GPU can serve."""

from collections.abc import Iterator
from itertools import pairwise

LOCAL_LAYERS = {
    "--transformer-impl": "local",
    "--attention-backend": "unfused",
    "--no-gradient-accumulation-fusion": "",
    "--no-masked-softmax-fusion": "",
    "--no-persist-layer-norm": "",
    "--no-rope-fusion": "",
    "--no-bias-gelu-fusion": "",
    "--no-bias-swiglu-fusion": "",
    "--no-bias-dropout-fusion": "",
}
"""What the core needs where neither Transformer Engine nor Apex is, on a GPU too. An empty value marks a switch."""

# Flags that host mode needs, added where the user did not give them.
_DEFAULTS = {
    "--distributed-backend": "gloo",
    **LOCAL_LAYERS,
    "--num-workers": "0",
    "--use-cpu-initialization": "",
}

# Flags with a choice that only a GPU can serve: the values that host mode can.
POSSIBLE = {
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    "--attention-backend": "unfused local auto",
    "--moe-token-dispatcher-type": "alltoall allgather",
    "--cross-entropy-fusion-impl": "native",
    "--cuda-graph-impl": "none",
    "--context-parallel-size": "1",
    "--cpu-offloading-num-layers": "0",
}

# Flags that ask for what only a GPU has. The core would stop on some of them, and silently ignore others.
IMPOSSIBLE = {
    "Transformer Engine computes on GPUs only": (
        "--fp8-format --fp8-param-gather --fp4-format --fp4-param-gather"
        " --te-rng-tracker --use-precision-aware-optimizer --apply-layernorm-1p --use-te-activation-func"
        " --use-transformer-engine-op-fuser --fused-residual-rmsnorm --moe-latent-size --te-precision-config-file"
        " --experimental-attention-variant --symmetric-ar-type"
        " --save-activations-interval --save-dgrads-interval"
    ),
    "the fused kernel runs on GPUs only": (
        "--moe-permute-fusion --moe-router-fusion --moe-enable-deepep --use-flash-attn"
    ),
    "the overlap needs the streams of a GPU": "--tp-comm-overlap --overlap-moe-expert-parallel-comm",
    "training would change the tensors while they are written": "--async-save --use-persistent-ckpt-worker",
    "everything is in host memory already": "--optimizer-cpu-offload --fine-grained-activation-offloading",
    "it is about the GPUs themselves": "--record-memory-history --gpu-sniff-test-interval",
    "CUDA graphs need a GPU": "--enable-cuda-graph --external-cuda-graph --optimizer-cuda-graph",
    "gloo carries all messages": "--use-nccl-ub --use-sharp --pipeline-model-parallel-comm-backend",
    "FSDP places its shards by CUDA device": "--use-megatron-fsdp --use-torch-fsdp2",
}

LEFT_OUT = {"--moe-grouped-gemm": "the kernel of GPUs computes what the experts compute one by one"}
"""Switches that host mode leaves out and says so: flag files for GPUs have them, and no result depends on them."""


def words_of(flags: dict[str, str]) -> list[str]:
    """A table of flags, such as LOCAL_LAYERS, as words of a command line."""
    return [word for pair in flags.items() for word in pair if word]


def given_flags(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Each flag of argv with its value, from `--flag value` as from `--flag=value`; "" where no value follows."""
    for word, after in pairwise([*argv, "--"]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            yield flag, value if equals or after.startswith("--") else after


def missing_defaults(argv: list[str]) -> list[str]:
    """Words for the flags that host mode needs and argv does not give."""
    given = dict(given_flags(argv))
    return words_of({flag: value for flag, value in _DEFAULTS.items() if flag not in given})


def refuse_gpu_flags(argv: list[str]) -> None:
    """Raise ValueError for the first flag that only a GPU can serve."""
    for flag, value in given_flags(argv):
        possible = POSSIBLE.get(flag, "").split()
        if value and possible and value not in possible:
            raise ValueError(f"{flag} {value}: in host mode it must be {' or '.join(possible)}")
        for reason, flags in IMPOSSIBLE.items():
            if flag in flags.split():
                raise ValueError(f"{f'{flag} {value}'.strip()}: not possible in host mode, {reason}; leave it out")


def without_gpu_kernels(argv: list[str]) -> tuple[list[str], list[str]]:
    """argv without the switches that host mode leaves out, and a line to say for each of them."""
    lines = [f"host mode: {flag} is left out, {reason}" for flag, reason in LEFT_OUT.items() if flag in argv]
    return [word for word in argv if word not in LEFT_OUT], lines
