"""What the regret study compares: a converged base with narrow experts, specialists continued from it at one k' each,
and every way to make one checkpoint for all of those k'.

k = 4 of 24 experts of half the hidden size, and a vocabulary of 512, so that nearly half of the weights that work on a
token are those of experts: beside 2048 words narrower ones do not matter. A step of a continued run has 8 micro-batches
and can train several k'.
"""

import dataclasses
from functools import partial

from study_family import Family, Method

E, K = 24, 4
GRID = (2, 4, 8, 12)
"""The k' that regret is judged at: k/2, k, 2k, 3k."""
SEEDS = (1, 2, 3)
LAYERS, MICRO_BATCHES = 2, 8
VOCAB = 512

SHARED = """--adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1 --lr-decay-style cosine --log-interval 10
    --eval-iters 0 --split 99,1,0 --no-create-attention-mask-in-dataloader --no-save-optim"""
LR = "--lr 1e-3 --min-lr 5e-5 --lr-warmup-iters 10"

FAMILY = Family(
    layers=LAYERS,
    k=K,
    fitted_ks=(8, 12),
    model=f"""--num-layers {LAYERS} --hidden-size 64 --num-attention-heads 4 --seq-length 128
        --max-position-embeddings 128 --num-experts {E} --moe-router-topk {K} --moe-ffn-hidden-size 32
        --ffn-hidden-size 32 --swiglu --disable-bias-linear --normalization RMSNorm
        --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
        --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32
        --moe-token-dispatcher-type alltoall""",
    base_train=f"--micro-batch-size 32 --global-batch-size 32 {SHARED}",
    train=f"--micro-batch-size 4 --global-batch-size {4 * MICRO_BATCHES} {SHARED}",
    base_lr="--lr 5e-3 --min-lr 5e-5 --lr-warmup-iters 100",
    bases={"base": "", "base-raw": "--moe-router-pre-softmax"},
    base_iters=5000,
    continued_iters=300,
    micro_batches=MICRO_BATCHES,
    evaluation="--micro-batch-size 64 --global-batch-size 64 --no-create-attention-mask-in-dataloader",
    held_out_tokens=65_536,
    data="text",
)
QUICK = dataclasses.replace(FAMILY, continued_iters=60, held_out_tokens=32_768)
"""The whole table at small size, one seed."""

PREFIX = "--emoe-selection prefix"
OTHERS = " ".join(str(k) for k in GRID if k != K)
MEAN_K = (K + (sum(GRID) - K) / (len(GRID) - 1)) / 2
"""Experts of a pass where half of the passes are at K and the others dealt out over the rest of the grid."""
UNIFORM = " ".join("1" if k in GRID else "0" for k in range(GRID[0], GRID[-1] + 1))
STRATIFIED = f"{PREFIX} --emoe-k-schedule stratified --emoe-k-grid {OTHERS}"
SCALES = f"{STRATIFIED} --emoe-budget-scales --emoe-tail-scale 0.25"
BELOW = f"{PREFIX} --emoe-k-schedule stratified --emoe-k-grid {GRID[0]}"
"""Trained below k alone: above k a fitted tail scale does without."""
TEACHER = "--emoe-teacher {base} --emoe-teacher-weight 0.7"
"""The base itself, at its own k."""
THIRDS = f"{PREFIX} --emoe-k-schedule stratified --emoe-k-grid {GRID[0]} {GRID[-1]} --emoe-k-default-prob 0.3333"
MMOE = f"{PREFIX} --emoe-k-schedule weighted --emoe-k-min {GRID[0]} --emoe-k-max {GRID[-1]} --emoe-k-draw layer"

SUFFIX = {"base": "", "base-raw": "-raw"}
"""Of the names of the methods that continue a base."""


def specialist(k: int, base: str = "base") -> str:
    """Name of the method that is trained at `k` alone."""
    return ("topk" if k == K else f"specialist-{k}") + SUFFIX[base]


_method = partial(Method, lr=LR, ks=GRID)
_at_k = partial(_method, k=K)
SPECIALISTS = (
    _at_k(specialist(K), "", "plain top-k at 4, the specialist at 4", fit=True),
    *(_method(specialist(k), "", f"plain top-k at {k}", k=k) for k in GRID if k != K),
)
STEPS_OF_SEVERAL = (
    _at_k("stratified-scales", SCALES, "half of a step's micro-batches at 4, half at 2, 8, 12; learned scales"),
    _at_k("second-pass", f"{SCALES} --emoe-second-pass 1", "each batch at 4, and at 2, 8 or 12, weighted alike"),
    _at_k("below-half", f"{BELOW} --emoe-budget-scales", "half of a step's micro-batches at 4, half at 2", fit=True),
    _at_k(
        "below-5-of-8",
        f"{BELOW} --emoe-budget-scales --emoe-k-default-prob 0.375",
        "three eighths of a step's micro-batches at 4, five at 2",
        fit=True,
    ),
    _at_k(
        "below-6-of-8",
        f"{BELOW} --emoe-budget-scales --emoe-k-default-prob 0.25",
        "a quarter of a step's micro-batches at 4, the others at 2",
        fit=True,
    ),
    _at_k(
        "below-second-pass",
        f"{BELOW} --emoe-budget-scales --emoe-second-pass 1",
        "each batch at 4 and at 2, weighted alike",
        fit=True,
    ),
    _at_k("stratified-weight", f"{SCALES} --emoe-other-weight 0.3", "stratified-scales, other k weighted 0.3"),
    _at_k("stratified-3-of-4", f"{SCALES} --emoe-k-default-prob 0.75", "stratified-scales, three quarters at 4"),
    _at_k("stratified", STRATIFIED, "stratified-scales without the learned scales and the tail scale", fit=True),
)
TAUGHT = (
    _at_k(
        "stratified-teacher",
        f"{THIRDS} --emoe-budget-scales --emoe-tail-scale 0.25 {TEACHER}",
        "a third of a step's micro-batches each at 2, 4 and 12, learned scales; the base at 4 is a teacher in all",
    ),
    _at_k(
        "below-half-teacher",
        f"{BELOW} --emoe-budget-scales {TEACHER}",
        "half of a step's micro-batches at 4, half at 2; the base at 4 is a teacher in all",
        fit=True,
    ),
    _at_k("stratified-thirds", f"{THIRDS} --emoe-budget-scales --emoe-tail-scale 0.25", "without the teacher"),
    _at_k("topk-teacher", TEACHER, "plain top-k at 4, taught by the base at 4", fit=True),
    *(
        _method(f"specialist-{k}-teacher", TEACHER, f"plain top-k at {k}, taught by the base at 4", k=k)
        for k in GRID
        if k != K
    ),
)
EQUAL_FLOPS = (  # as many expert FLOPs as plain top-k: fewer tokens
    _at_k("stratified-scales-equal-flops", SCALES, "stratified-scales for fewer steps", share=K / MEAN_K),
    _at_k(
        "second-pass-equal-flops",
        f"{SCALES} --emoe-second-pass 1",
        "second-pass for fewer steps",
        share=K / (2 * MEAN_K),
    ),
)
OLDER = (
    _at_k(
        "recipe-0.1.0",
        f"{PREFIX} --emoe-k-schedule default-or-larger --emoe-k-draw layer --emoe-tail-scale 0.25",
        "half of the layer draws at 4, half uniform in 5 ... 12, tail scaled by 0.25",
        fit=True,
    ),
    _at_k("mmoe", f"{MMOE} --emoe-k-weights {UNIFORM}", "M-MoE: each layer draws 2, 4, 8 or 12 a step", fit=True),
    _at_k("emoe", f"--emoe-selection coactivation --emoe-pool-k {3 * K}", "EMoE: sampling, K = 3k", fit=True),
)


def methods(base: str) -> tuple[Method, ...]:
    """Every way to continue a base, the specialists first."""
    every = (*SPECIALISTS, *STEPS_OF_SEVERAL, *TAUGHT, *EQUAL_FLOPS, *OLDER)
    return tuple(dataclasses.replace(one, name=one.name + SUFFIX[base], base=base) for one in every)


CORE = (*map(specialist, GRID), "stratified-teacher", "below-half-teacher", "stratified-scales")
"""Run with all seeds before the others have a second one."""
MAIN, RAW = methods("base"), methods("base-raw")
METHODS = (*MAIN, *RAW)
FITTED_IN_QUICK = (specialist(K), "recipe-0.1.0")
QUICK_MAIN = tuple(dataclasses.replace(one, fit=one.name in FITTED_IN_QUICK) for one in MAIN)
"""A fit takes longer than a small run."""
