"""Every elastic setting: field, unit, source, default. The rules between them are in elastic_rules.py.

Flags are generated from the fields (`emoe_pool_k` is `--emoe-pool-k`), so a default exists once and the help text is
the string under the field. Sources: EMoE (arXiv 2509.21892), Matryoshka MoE (arXiv 2509.26520), ERNIE 5.0 (arXiv
2602.04705), and of the baselines beside their fields. The last fields are model features: parts of released models that
Megatron-Core has no flag for.
"""

from argparse import Namespace
from dataclasses import dataclass, fields
from typing import Any, Literal

from megatron_emoe.settings.tail_scale import parse_tail_scale

DEFAULT_HR_LOSS_COEFF = 1e-3
DEFAULT_PROB = 0.8
DEFAULT_LARGER_PROB = 0.5
DEFAULT_LARGEST = 3  # times k: the end of the range that docs/study.md asks for
DEFAULT_TOP_P = 0.4
DEFAULT_ENTROPY_LOSS_COEFF = 1e-4
DEFAULT_NOISE_LOSS_COEFF = 0.1
DEFAULT_LORA_RANK = 8


@dataclass
class ElasticConfig:
    """Elastic MoE: which experts a token may use in training, and how many. Everything off: exactly Megatron-Core's
    top-k."""

    emoe_selection: Literal["topk", "coactivation", "prefix", "top-p", "null-experts", "noisy-topk"] = "topk"
    """How experts are selected in training. topk: the stock router at --moe-router-topk. coactivation: k experts drawn
    from a pool of the top m (EMoE, arXiv 2509.21892). prefix: top-k at the k that the schedule draws (M-MoE, arXiv
    2509.26520). top-p: as many as it takes for probabilities to sum to p (arXiv 2403.07652). null-experts: top-k over
    the experts and some that do nothing (AdaMoE, arXiv 2406.13233). noisy-topk: top-k of noisy logits (arXiv
    1701.06538). Evaluation is plain top-k, but top-p where no k' is asked for, and with the null experts."""

    emoe_pool_k: int | None = None
    """K, experts: the largest co-activation pool and the largest k' to prepare for (EMoE's k_ideal). Required by
    coactivation; larger than the smallest k, at most the number of experts."""

    emoe_pool_draw: Literal["token", "microbatch", "step"] = "token"
    """How often the pool size m is drawn from {k, ..., K}: for every token, once per micro-batch, or once per step."""

    emoe_pool_fixed: bool = False
    """Use m = K always instead of drawing m: an ablation, it thins the training signal of the top ranks."""

    emoe_pool_keep: int = 0
    """Ranks that every token keeps: the best of them are always used, the rest of the k are drawn from the other ranks
    of the pool. Below the smallest k. 0: the paper's rule."""

    emoe_pool_prob: float = 1.0
    """Share of the draws (tokens, micro-batches or steps, as --emoe-pool-draw says) that sample from a pool; the others
    use plain top-k. In (0, 1]."""

    emoe_pool_anneal_iters: int = 0
    """Iterations over which the largest pool grows linearly from the active k to K. 0: K from the start."""

    emoe_k_schedule: Literal[
        "constant", "uniform", "weighted", "default-or-smaller", "default-or-larger", "ramp", "stratified"
    ] = "constant"
    """The number of active experts in training. constant: --moe-router-topk. uniform: any k in [k-min, k-max].
    weighted: likewise with --emoe-k-weights. default-or-smaller: --moe-router-topk with probability
    --emoe-k-default-prob, else uniform in [k-min, k - 1] (ERNIE 5.0). default-or-larger: likewise, else uniform in
    [k + 1, k-max]. ramp: linear from k-min to k-max over --emoe-k-ramp-iters. stratified, with --emoe-budget-scales
    the recipe of docs/study.md: every step trains --moe-router-topk and others together: a share of its micro-batches,
    --emoe-k-default-prob, at --moe-router-topk, the rest dealt out over --emoe-k-grid."""

    emoe_k_grid: list[int] | None = None
    """Experts: the k that stratified deals out beside --moe-router-topk, each as often as the others. Unset: half of
    it, twice and three times."""

    emoe_k_min: int | None = None
    """Experts: the smallest k that the schedule draws; where weights are renormalised, at least 2 (else routers get no
    gradient from those draws). Required by every schedule but constant and default-or-larger."""

    emoe_k_max: int | None = None
    """Experts: the largest k that the schedule draws. Required by uniform, weighted and ramp. Unset with
    default-or-larger: 3 times --moe-router-topk."""

    emoe_k_weights: list[float] | None = None
    """One non-negative weight for each k in [k-min, k-max], in that order; they need not sum to 1. Required by
    weighted."""

    emoe_k_default_prob: float | None = None
    """Probability of --moe-router-topk, in (0, 1). Unset: 0.8 in default-or-smaller, ERNIE 5.0's value, and 0.5 in
    default-or-larger and stratified, where it is the share of the micro-batches."""

    emoe_k_ramp_iters: int | None = None
    """Iterations from k-min to k-max in the schedule ramp. Required by ramp."""

    emoe_k_draw: Literal["step", "microbatch", "layer"] = "step"
    """How often k is drawn: once per optimizer step, once per micro-batch, or per step and layer (each layer its own k:
    best in M-MoE)."""

    emoe_other_weight: float = 1.0
    """With stratified, how much a micro-batch at another k than --moe-router-topk counts in the loss and in the
    load-balancing losses, against one at that k. Above 0. The mean over micro-batches stays 1."""

    emoe_second_pass: float = 0.0
    """With stratified, run every micro-batch twice, at --moe-router-topk and at a k dealt from --emoe-k-grid, whose
    loss has this weight against the first one's; together they count as one. 0: one pass. It costs a second forward
    and backward pass."""

    emoe_budget_scales: bool = False
    """Learn, for every layer, trained k and rank, a factor on the weights of the selected experts, beside the tail
    scale and likewise before renormalisation; all start at 1, and at --moe-router-topk stay there. Between trained k
    it is interpolated, in evaluation too."""

    emoe_seed: int = 1234
    """Seed of all elastic draws. They depend on it, the iteration, the micro-batch, the layer and the data-parallel
    rank alone, never on other random numbers."""

    emoe_hr_loss_coeff: float | None = None
    """Weight of the hierarchical router loss -KL(q || uniform) per layer (EMoE). Unset: 1e-3 with coactivation, else
    0."""

    emoe_balance_on: Literal["dispatched", "topk"] = "dispatched"
    """What the load-balancing loss counts under coactivation: the experts that were drawn, or those plain top-k would
    use. Both by the scores alone, as Megatron-Core counts, without a selection bias and groups."""

    emoe_top_p: float | None = None
    """p, probability in (0, 1]: a token uses its best experts until they sum to p. Unset: 0.4 with top-p, the paper's
    value."""

    emoe_top_p_max: int | None = None
    """Experts: with top-p, no token uses more. Unset: no limit but the number of experts."""

    emoe_entropy_loss_coeff: float | None = None
    """Weight of the router's entropy as a loss per layer, which keeps top-p from using ever more experts. Unset: 1e-4
    with top-p, the paper's value."""

    emoe_null_experts: int | None = None
    """N, null experts of each layer, among which and the true ones --moe-router-topk are chosen. Balanced, a token uses
    k E / (E + N) true experts on average. Required by null-experts."""

    emoe_importance_loss_coeff: float | None = None
    """Weight of the squared coefficient of variation of the experts' summed weights. Unset: 0.1 with noisy-topk, the
    paper's value."""

    emoe_load_loss_coeff: float | None = None
    """The same of the experts' smooth load, a token's probability of using an expert. Unset: 0.1 with noisy-topk."""

    emoe_combine: Literal["model", "renormalize", "raw"] = "model"
    """Weights of the selected experts. model: the model's own rule on the selected set (top-p and null-experts: their
    papers' rules, which are raw and renormalize). renormalize: they sum to 1 (times the scaling factor). raw: the
    scores over all experts, unscaled by the selection. In training and in evaluation."""

    emoe_tail_scale: list[str] | None = None
    """At k' > --moe-router-topk, multiply the weights of the selected experts past the best k by a, before
    renormalisation: one number, or pairs k':a such as 6:0.25 8:0.1 (linear between them). 1 and unset equal plain
    top-k', 0 plain top-k (not with group limits, a capacity factor, or k = 1 and other scores than softmax). In
    training and in evaluation; tools/fit_tail_scale.py finds a table."""

    emoe_distill_coeff: float = 0.0
    """Weight of self-distillation: where a layer draws another number than --moe-router-topk, the divergence from the
    same weights' output at --moe-router-topk is added to the loss. It costs a second forward pass of those
    micro-batches, and none with --emoe-second-pass. 0: none."""

    emoe_teacher: str | None = None
    """Folder of a torch_dist checkpoint of the same model, as a rule the one that the run starts from: in every
    micro-batch, whatever its k', the divergence from that model's output at its own k is a part of the loss. It costs
    the weights once more in memory and a forward pass of every micro-batch. Unset: none."""

    emoe_teacher_weight: float = 0.7
    """w, how much of the loss that divergence is: (1 - w) of the language-model loss and w of the divergence."""

    emoe_train: Literal["all", "router"] = "all"
    """Which weights are trained. all: with --emoe-lora-experts the low-rank experts and the routers. router: the
    routers alone, everything else stays as it is."""

    emoe_lora_experts: int | None = None
    """E, low-rank experts on the MLP of every layer of a dense model, which stays as it is (LoRAMoE, arXiv 2312.09979).
    A router chooses --moe-router-topk of them for each token; they and the routers are trained. Takes the place of
    --num-experts."""

    emoe_lora_rank: int | None = None
    """R, rank of each low-rank expert. Unset: 8 with --emoe-lora-experts."""

    emoe_lora_alpha: float | None = None
    """A low-rank expert's output is multiplied by alpha / R (LoRA, arXiv 2106.09685). Unset: 2 R, so by 2."""

    emoe_gradient_check: Literal["stop", "off"] = "stop"
    """What to do where a weight that is to be trained gets no gradient. stop: end the run and name it where it had none
    in the first ten steps; refuse draws of k = 1 where that one weight is renormalised. off: nothing."""

    emoe_eval_k: list[int] | None = None
    """At every evaluation, also report the validation loss at each of these k' (experts), on the same batches."""

    emoe_router_watch: Literal["off", "warn", "stop"] = "warn"
    """What to do on logged steps where routing of a layer has broken down: an entropy that is no number, the same
    experts for all tokens, half of the experts without a token. stop: end the run after three such steps in a row."""

    emoe_coactivation_interval: int = 0
    """Iterations between measurements of the expert-by-expert co-activation matrix. 0: never."""

    emoe_qk_norm: Literal["core", "full", "latent"] = "core"
    """Model feature: what --qk-layernorm norms. core: each head. full: queries and keys over their whole width (OLMoE,
    arXiv 2409.02060). latent: with --multi-latent-attention and no --q-lora-rank, the compressed keys and values only
    (DeepSeek-V2-Lite, arXiv 2405.04434), with an epsilon of 1e-6."""

    emoe_clip_qkv: float | None = None
    """Model feature: clamp queries, keys and values to [-c, c] after their norm and before rotary embedding (OLMoE).
    Unset: no clamp."""

    @property
    def draws_k(self) -> bool:
        """Whether the number of active experts varies in training."""
        return self.emoe_k_schedule != "constant"

    @property
    def samples(self) -> bool:
        """Whether experts are drawn from a pool in training."""
        return self.emoe_selection == "coactivation"

    @property
    def draws(self) -> bool:
        """Whether anything at all is drawn in training: without it, a forward pass need not know where it stands."""
        return self.samples or self.draws_k or self.adds_noise

    @property
    def adds_noise(self) -> bool:
        """Whether noise is added to the logits in training."""
        return self.emoe_selection == "noisy-topk"

    @property
    def counts_vary(self) -> bool:
        """Whether every token has its own number of experts, which the dispatchers then have to count."""
        return self.emoe_selection in ("top-p", "null-experts")

    @property
    def hr_loss_coeff(self) -> float:
        """lambda of the hierarchical router loss with its default resolved."""
        if self.emoe_hr_loss_coeff is not None:
            return self.emoe_hr_loss_coeff
        return DEFAULT_HR_LOSS_COEFF if self.samples else 0.0

    @property
    def top_p(self) -> float:
        """p with its default resolved."""
        return DEFAULT_TOP_P if self.emoe_top_p is None else self.emoe_top_p

    @property
    def entropy_loss_coeff(self) -> float:
        """Weight of the entropy loss with its default resolved."""
        default = DEFAULT_ENTROPY_LOSS_COEFF if self.emoe_selection == "top-p" else 0.0
        return default if self.emoe_entropy_loss_coeff is None else self.emoe_entropy_loss_coeff

    @property
    def noise_loss_coeffs(self) -> tuple[float, float]:
        """Weights of the importance and the load loss with their defaults resolved."""
        default = DEFAULT_NOISE_LOSS_COEFF if self.adds_noise else 0.0
        importance, load = self.emoe_importance_loss_coeff, self.emoe_load_loss_coeff
        return default if importance is None else importance, default if load is None else load

    @property
    def experts_flag(self) -> str:
        """The flag that gives the number of experts, for messages."""
        return "--num-experts" if self.emoe_lora_experts is None else "--emoe-lora-experts"

    @property
    def lora_rank(self) -> int:
        """R with its default resolved."""
        return DEFAULT_LORA_RANK if self.emoe_lora_rank is None else self.emoe_lora_rank

    @property
    def lora_scale(self) -> float:
        """alpha / R with alpha's default resolved."""
        return 2.0 if self.emoe_lora_alpha is None else self.emoe_lora_alpha / self.lora_rank

    @property
    def default_prob(self) -> float:
        """Probability of the model's own k in default-or-smaller and default-or-larger with its default resolved."""
        if self.emoe_k_default_prob is not None:
            return self.emoe_k_default_prob
        return DEFAULT_PROB if self.emoe_k_schedule == "default-or-smaller" else DEFAULT_LARGER_PROB

    def k_grid(self, model_k: int) -> list[int]:
        """The k beside `model_k` that the schedule stratified deals out, ascending."""
        unset = {max(1, model_k // 2), 2 * model_k, DEFAULT_LARGEST * model_k} - {model_k}
        return sorted(unset if self.emoe_k_grid is None else self.emoe_k_grid)

    def tail_scale_at(self, k: int, model_k: int) -> float:
        """a(k): what the weights of the selected experts past the best `model_k` are multiplied by."""
        if k <= model_k or self.emoe_tail_scale is None:
            return 1.0
        return parse_tail_scale(self.emoe_tail_scale).at(k)

    def k_range(self, model_k: int) -> tuple[int, int]:
        """Smallest and largest k of the schedule; `model_k` is --moe-router-topk."""
        if self.emoe_k_schedule == "constant":
            return model_k, model_k
        if self.emoe_k_schedule == "stratified":
            ks = [model_k, *self.k_grid(model_k)]
            return min(ks), max(ks)
        if self.emoe_k_schedule == "default-or-smaller":
            return _given(self.emoe_k_min), model_k
        if self.emoe_k_schedule == "default-or-larger":
            return model_k, DEFAULT_LARGEST * model_k if self.emoe_k_max is None else self.emoe_k_max
        return _given(self.emoe_k_min), _given(self.emoe_k_max)

    def largest_k(self, model_k: int) -> int:
        """The largest k that training or the evaluations of a run use; `model_k` is --moe-router-topk."""
        return max(model_k, self.k_range(model_k)[1], *(self.emoe_eval_k or []))

    def k_fields(self) -> tuple[str, str]:
        """Names of the settings that hold the two numbers of `k_range`, for messages."""
        if self.emoe_k_schedule == "stratified":
            return "emoe_k_grid", "emoe_k_grid"
        low = "moe_router_topk" if self.emoe_k_schedule in ("constant", "default-or-larger") else "emoe_k_min"
        high = "moe_router_topk" if self.emoe_k_schedule in ("constant", "default-or-smaller") else "emoe_k_max"
        return low, high

    def settings(self) -> dict[str, Any]:
        """Name and value of every elastic field, for checkpoints and logs."""
        return {f.name: getattr(self, f.name) for f in fields(ElasticConfig)}


def _given(value: int | None) -> int:
    assert value is not None, "validate_elastic() runs before any draw"
    return value


def elastic_settings(args: Namespace) -> ElasticConfig:
    """The elastic settings among parsed arguments."""
    return ElasticConfig(**{field.name: getattr(args, field.name) for field in fields(ElasticConfig)})


def flag(name: str) -> str:
    """`emoe_pool_k` -> `--emoe-pool-k`."""
    return "--" + name.replace("_", "-")


ONLY_WATCHING = ("emoe_eval_k", "emoe_coactivation_interval", "emoe_router_watch", "emoe_gradient_check")
"""Settings that change nothing of what is trained."""

MODEL_FEATURES = ("emoe_qk_norm", "emoe_clip_qkv")  # part of which model it is, like the number of layers
