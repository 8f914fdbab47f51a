"""Which of Megatron's flags have no place in a run of this package: one declaration, by which they are refused and
docs/flags.md is written. Made by looking, for megatron-core 0.19, at who reads each argument.

A flag that nothing on the way of a run reads would be accepted and do nothing; it is refused where it stands on a
command line, never for its default.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec

from megatron_emoe.host.flags import given_flags

REFUSED = {
    "it is about reinforcement learning, whose code is no part of megatron-core's package": (
        "--perform-rl-step --rl-* --no-rl-* --grpo-* --langrl-env-config --refit-method"
    ),
    "it is about vision models": (
        "--num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction"
        " --head-lr-mult --vision-* --swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-*"
        " --mrope-section"
    ),
    "it is about speech models": "--sample-rate",
    "it is about BERT, T5 or retrieval": (
        "--ict-* --biencoder-* --bert-* --titles-data-path --query-in-block-prob --use-one-sent-docs"
        " --evidence-data-path --retriever-* --block-data-path --embedding-path --indexer-batch-size"
        " --indexer-log-interval --output-bert-embeddings --mask-prob --short-seq-prob --encoder-num-layers"
        " --decoder-num-layers --encoder-seq-length --decoder-seq-length --vocab-extra-ids"
        " --relative-attention-num-buckets --relative-attention-max-distance"
    ),
    "it is about generating text, which no program here does": (
        "--inference-* --no-inference-* --max-tokens-to-oom --use-legacy-static-engine --decode-only-cuda-graphs"
        " --enable-chunked-prefill --num-speculative-tokens --use-same-sampling-seed-across-dp-ranks --flash-decode"
        " --mlp-chunks-for-prefill --nccl-all-reduce-for-prefill --moe-pad-experts-for-cuda-graph-inference"
        " --cache-mla-latents"
    ),
    "it is about state space models": (
        "--is-hybrid-model --hybrid-override-pattern --mamba-* --disable-mamba-mem-eff-path"
        " --mtp-hybrid-override-pattern"
    ),
    "NVIDIA's Kitchen is not public, megatron-core has a stub of it": "--use-kitchen-attention --kitchen-*",
    "it brings its own layers, which are not elastic": (
        "--spec --hybrid-layer-pattern --heterogeneous-layers-config-path --heterogeneous-layers-config-encoded-json"
    ),
    "not supported, the core would ignore every flag; give the settings as flags": "--yaml-cfg",
    "its dataset is not supported here, give plain --data-path": "--fim-*",
    "its data sampler is not supported here": "--hybrid-context-parallel --max-seqlen-per-dp-cp-rank",
    "its loss is that of another training script; --emoe-teacher and --emoe-distill-coeff are here": "--logits-*",
    "only Megatron's own training script restarts within a process": "--inprocess-*",
    "the model is built from its configuration, on whose way megatron-core does not read it": (
        "--freeze-all-layers --no-use-layer-wise-param-layout --create-all-gather-group --moe-use-upcycling"
        " --moe-upcycling-granularity"
    ),
    "its work is left to the caller, and Megatron's training loop does none of it": "--lazy-mpu-init",
    "not supported, its schedule takes a plan from the forward step": "--overlap-moe-expert-parallel-comm",
    "needs --overlap-moe-expert-parallel-comm, which is not supported": (
        "--delay-wgrad-compute --ep-overlap-early-attn-memory-release --high-priority-a2a-comm-stream"
    ),
    "megatron-core 0.19 cannot build its own configuration with it; give --init-method-std": (
        "--init-method-xavier-uniform"
    ),
    "megatron-core 0.19 cannot count the FLOPs of a model with it; give --make-vocab-size-divisible-by 1": (
        "--no-pad-vocab-size"
    ),
    "it is about a cluster of NVIDIA's own; --exit-signal-handler saves before a run is ended": "--adlr-*",
    "nothing in megatron-core 0.19 reads it": (
        "--apply-residual-connection-post-layernorm --openai-gelu --onnx-safe --exit-signal-handler-for-dataloader"
        " --dist-ckpt-save-pre-mcore-014 --enable-full-sharding-in-hsdp"
    ),
    "no longer valid; give --micro-batch-size": "--batch-size",
    "no longer valid; give --lr-warmup-iters or --lr-warmup-fraction": "--warmup",
    "no longer valid; give --tensor-model-parallel-size": "--model-parallel-size",
    "no longer valid; give --recompute-granularity": "--checkpoint-activations",
    "no longer has an effect; give --ckpt-format": "--use-dist-ckpt --dist-ckpt-format",
    "no longer has an effect; give --attention-backend flash": "--use-flash-attn",
    "no longer has an effect, it is the default": "--ckpt-fully-parallel-save --use-mcore-models --disable-msc",
}
"""Why flags are refused -> their names; a * stands for any rest of a name."""

REFUSED_VALUES = {
    "--position-embedding-type relative": "only T5 has it, this model would have no positions at all",
    "--position-embedding-type mrope": "it is about vision models",
    "--dataloader-type external": "the datasets here are Megatron's own; give single or cyclic",
    "--rerun-mode report_stats": "megatron-core 0.19 knows this mode by another name than its flag",
}
"""A flag with the one value of it that is refused -> why."""

PACKAGES = {
    "--enable-ft-package": "nvidia_resiliency_ext",
    "--fault-injector-ranks": "nvidia_resiliency_ext",
    "--fault-injector-num-ranks": "nvidia_resiliency_ext",
    "--non-persistent-ckpt-type local": "nvidia_resiliency_ext",
    "--enable-msc": "multistorageclient",
    "--run-workload-inspector-server": "workload_inspector",
    "--hierarchical-context-parallel-sizes": "einops",
    **{f"--optimizer {name}": "emerging_optimizers" for name in "muon dist_muon adaptive_muon lion soap".split()},
}
"""A flag, or one value of it -> the package without which Megatron ends in an ImportError, or does nothing."""

NEEDS = {
    "--reuse-grad-buf-for-mxfp8-param-ag": "--fp8-param-gather",
    "--calc-ft-timeouts": "--enable-ft-package",
    "--ft-num-warmup-iters": "--enable-ft-package",
    "--phase-transition-iterations": "--train-samples",
    "--lr-decay-style WSD": "--lr-wsd-decay-iters or --lr-wsd-decay-samples",
    "--sharp-enabled-group": "--use-sharp",
    **dict.fromkeys((f"--save-{what}-interval" for what in "params activations wgrads dgrads".split()), "--save"),
    **dict.fromkeys(
        ("--main-grads-dtype", "--main-params-dtype", "--exp-avg-dtype", "--exp-avg-sq-dtype"),
        "--use-precision-aware-optimizer",
    ),
}
"""A flag, or one value of it -> the one without which Megatron stops late, or it does nothing."""


def refuse_unserved(words: Iterable[str]) -> None:
    """Refuse the first word of a command line that is a flag of Megatron's with no place here; flag files are read.

    Raises:
        ValueError: flag, value and rule.
    """
    given = list(given_flags([*words]))
    names = {name for name, _ in given}
    for name, value in given:
        reason = why_refused(name) or REFUSED_VALUES.get(f"{name} {value}")
        reason = reason or _what_is_missing(name, value, names)
        if reason is not None:
            raise ValueError(f"{f'{name} {value}'.strip()}: {reason}")
    if {"--exit-signal-handler", "--exit-signal-handler-for-training"} <= names:
        raise ValueError("--exit-signal-handler-for-training excludes --exit-signal-handler: it ends without saving")


def _what_is_missing(name: str, value: str, given: set[str]) -> str | None:
    both = f"{name} {value}"
    package, other = PACKAGES.get(name) or PACKAGES.get(both), NEEDS.get(name) or NEEDS.get(both)
    if package is not None and find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    if other is not None and not given & {*other.split()}:
        return f"needs {other}, which is not given"
    if name == "--exit-signal" and value not in signal.Signals.__members__:
        return "must be the name of a signal, such as SIGTERM"
    return None


def why_refused(name: str) -> str | None:
    """The reason why this flag is refused whatever its value, or None."""
    return next((reason for reason, pattern in _patterns() if fnmatchcase(name, pattern)), None)


def _patterns() -> Iterator[tuple[str, str]]:
    for reason, names in REFUSED.items():
        for pattern in names.split():
            yield reason, pattern
