"""What `make study` compares: one small model, its base runs, and every way to continue them.

Everything continues its base's checkpoint on the same data for the same number of steps, with the batch order and the
draws of its seed. E = 16 narrow experts, k = 2: half of the hidden size is active per token at k and one and a half
times of it at 3k, so more experts have something to give.
"""

from functools import partial

import study_family
from study_family import Family, elastic_config

__all__ = ["elastic_config"]

E, K = 16, 2
KS = (1, 2, 3, 4, 6, 8)
"""The k' of every sweep: 1 to 4k. The tail scale is fitted at two of them and linear in between."""
FITTED_KS = (4, 8)
BASE_ITERS, CONTINUED_ITERS = 1500, 250
SEEDS = (1, 2, 3)
EVALUATION = "--micro-batch-size 64 --global-batch-size 64 --no-create-attention-mask-in-dataloader"
HELD_OUT_TOKENS = 65_536

VOCAB = 1024
LAYERS = 2
MODEL = f"""--num-layers {LAYERS} --hidden-size 64 --num-attention-heads 2 --seq-length 128
    --max-position-embeddings 128 --num-experts {E} --moe-router-topk {K} --moe-ffn-hidden-size 16
    --ffn-hidden-size 16 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32
    --moe-token-dispatcher-type alltoall"""
TRAIN = """--micro-batch-size 16 --global-batch-size 16 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
    --lr-decay-style cosine --log-interval 10 --eval-iters 0 --split 99,1,0 --no-create-attention-mask-in-dataloader
    --no-save-optim"""
BASE_LR = "--lr 3e-3 --min-lr 1e-3 --lr-warmup-iters 100"
HIGH_LR = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10"
LOW_LR = "--lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 10"

BASES = {"base": "", "base-raw": "--moe-router-pre-softmax"}
"""Checkpoints to continue, and their flags: a router that renormalises (as ERNIE-4.5), and one that does not (as OLMoE,
Qwen1.5-MoE, DeepSeek-V2-Lite)."""


FAMILY = Family(
    layers=LAYERS,
    k=K,
    fitted_ks=FITTED_KS,
    model=MODEL,
    base_train=TRAIN,
    train=TRAIN,
    base_lr=BASE_LR,
    bases=BASES,
    base_iters=BASE_ITERS,
    continued_iters=CONTINUED_ITERS,
    micro_batches=1,
    evaluation=EVALUATION,
    held_out_tokens=HELD_OUT_TOKENS,
    data="stdlib",
)
Method = partial(study_family.Method, lr=HIGH_LR, k=K, ks=KS)

EMOE = f"--emoe-selection coactivation --emoe-pool-k {3 * K}"
ONE_TOO = "--emoe-k-min 1 --emoe-gradient-check off"
"""Draws of k = 1, as M-MoE has them: where weights are renormalised, routers get no gradient of the loss in those."""
UNIFORM = f"--emoe-selection prefix --emoe-k-schedule uniform {ONE_TOO} --emoe-k-max {3 * K}"
MIXED = f"--emoe-selection prefix --emoe-k-schedule weighted --emoe-k-min {K} --emoe-k-max {3 * K} --emoe-k-draw layer"
HALF_AT_K = "--emoe-k-weights 3 1 1 0 1"
RECIPE = "--emoe-selection prefix --emoe-k-schedule default-or-larger --emoe-k-draw layer --emoe-tail-scale 0.25"
LAST_SLOT = f"{EMOE} --emoe-pool-fixed --emoe-pool-keep {K - 1} --emoe-hr-loss-coeff 0"
TAIL = f"{MIXED} {HALF_AT_K} --emoe-tail-scale 0.25"

MAIN = (
    Method("topk", "", "plain top-k at k", fit=True),
    Method(
        "recipe", RECIPE, "half of the layer draws at k, half uniform in k + 1 ... 3k, tail scaled by 0.25", fit=True
    ),
    Method("emoe", EMOE, "EMoE: co-activation sampling, K = 3k, its router loss", fit=True),
    Method("mmoe", UNIFORM, "M-MoE: k uniform in 1 ... 3k per step", fit=True),
    Method("topk-3k", "", "plain top-k trained at 3k", k=3 * K),
    Method("last-slot", LAST_SLOT, "the best k - 1 always, the last from ranks k ... 3k", fit=True),
    Method("mmoe-layer", f"{UNIFORM} --emoe-k-draw layer", "M-MoE, each layer its own k"),
    Method(
        "top-p",
        "--emoe-selection top-p --emoe-combine renormalize",
        "top-p routing (p = 0.4) with its entropy loss; weights as the base has them",
    ),
    Method(
        "null-experts",
        f"--emoe-selection null-experts --emoe-null-experts {E}",
        "AdaMoE: 2k of E experts and E null experts, k true ones on average",
        k=2 * K,
        ks=tuple(2 * k for k in KS),
    ),
    Method("noisy-topk", "--emoe-selection noisy-topk", "noisy top-k with importance and load losses"),
)

CORE = ("topk", "recipe", "emoe", "mmoe", "topk-3k")
"""Run with all seeds before any ablation."""

ABLATIONS = (
    Method(
        "tail", TAIL, "half of the layer draws at k, half at k' in {3, 4, 6} with the tail scaled by 0.25", fit=True
    ),
    Method("tail-0.5", f"{MIXED} {HALF_AT_K} --emoe-tail-scale 0.5", "as tail, scaled by 0.5", fit=True),
    Method("tail-1", f"{MIXED} {HALF_AT_K}", "as tail, not scaled: half plain steps, half larger k", fit=True),
    Method("emoe-half", f"{EMOE} --emoe-pool-prob 0.5", "EMoE, half of the tokens plain"),
    Method("emoe-2k", EMOE.replace(str(3 * K), str(2 * K)), "EMoE, K = 2k"),
    Method("emoe-no-loss", f"{EMOE} --emoe-hr-loss-coeff 0", "EMoE without its router loss"),
    Method("emoe-loss-1e-2", f"{EMOE} --emoe-hr-loss-coeff 1e-2", "EMoE, router loss ten times the default"),
    Method("emoe-step", f"{EMOE} --emoe-pool-draw step", "EMoE, pool size drawn per step"),
    Method("emoe-anneal", f"{EMOE} --emoe-pool-anneal-iters {CONTINUED_ITERS}", "EMoE, pool annealed in"),
    Method("emoe-keep", f"{EMOE} --emoe-pool-keep 1", "EMoE, the best expert always kept"),
    Method("topk-low-lr", "", "plain top-k, a tenth of the learning rate", lr=LOW_LR),
    Method("emoe-low-lr", EMOE, "EMoE, a tenth of the learning rate", lr=LOW_LR),
    Method("tail-low-lr", TAIL, "tail, a tenth of the learning rate", lr=LOW_LR, fit=True),
    Method(
        "tail-low-k",
        f"{MIXED.replace(f'--emoe-k-min {K}', ONE_TOO)} --emoe-k-weights 1 3 1 1 0 1 --emoe-tail-scale 0.25",
        "as tail, one draw in seven at k' = 1",
        fit=True,
    ),
    Method("tail-router", f"{TAIL} --emoe-train router", "as tail, only the routers trained", fit=True),
    Method(
        "recipe-distil", f"{RECIPE} --emoe-distill-coeff 1", "recipe, k' > k also follows the output at k", fit=True
    ),
)

RAW = (
    Method("topk-raw", "", "plain top-k at k, a base that does not renormalise", fit=True, base="base-raw"),
    Method("recipe-raw", RECIPE, "recipe, a base that does not renormalise", fit=True, base="base-raw"),
    Method("topk-3k-raw", "", "plain top-k trained at 3k, a base that does not renormalise", k=3 * K, base="base-raw"),
)

METHODS = (*MAIN, *ABLATIONS, *RAW)
