"""Comparisons of routing/kernel.py with selection.py, for any device: in Triton's interpreter, or on a GPU.

Logits of a token are all different here, and so are its random numbers: where there are ties, torch.topk may choose as
it likes. Where a bias or groups add rounded numbers up, tokens whose order hangs on the rounding are left out.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_emoe.routing import kernel as router_kernel
from megatron_emoe.routing import selection
from megatron_emoe.routing.kernel import Routed, RoutingRule, Wanted
from megatron_emoe.routing.losses import token_entropy

ALL = Wanted(entropy=True, balance=True, plain=True)
SIGMOID = {"score_function": "sigmoid", "rank_by_scores": True}
SOFTPLUS = {"score_function": "sqrtsoftplus", "rank_by_scores": True}
BEFORE = {"rank_by_scores": True, "normalize": False}  # softmax before selection
GROUPS = {"num_groups": 4, "group_topk": 2}
BIASED = {"bias": True}

# Name -> experts, k, largest pool, and the rest of the rule (softmax after selection unless it says otherwise).
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "softmax after, pool": (64, 8, 24, {}),
    "softmax before, pool": (64, 8, 24, BEFORE),
    "softmax before, renormalised": (96, 4, 12, BEFORE | {"normalize": True}),
    "softmax after, raw": (60, 4, 12, {"normalize": False}),
    "softmax bias": (64, 6, 6, BEFORE | BIASED),
    "softmax bias, pool": (64, 6, 18, BIASED | {"rank_by_scores": False}),
    "sigmoid": (60, 4, 12, SIGMOID | {"scale": 2.5}),
    "sigmoid bias": (96, 6, 16, SIGMOID | BIASED),
    "sigmoid, one expert": (60, 1, 7, SIGMOID | {"normalize": False}),
    "sqrtsoftplus": (64, 8, 20, SOFTPLUS),
    "sqrtsoftplus bias, raw": (60, 3, 10, SOFTPLUS | BIASED | {"normalize": False, "scale": 0.5}),
    "groups": (64, 4, 12, GROUPS),
    "groups before": (60, 6, 20, GROUPS | BEFORE | {"prob": 0.5}),
    "groups, sigmoid bias": (96, 5, 20, GROUPS | SIGMOID | BIASED),
    "all groups of one expert": (8, 4, 4, {"num_groups": 8, "group_topk": 4}),
    "one group": (12, 2, 6, {"num_groups": 1, "group_topk": 1}),
    "fixed pool": (64, 4, 16, {"pool": 11}),
    "fixed pool of k": (64, 4, 16, {"pool": 4}),
    "kept ranks": (64, 4, 16, {"keep": 2}),
    "kept ranks, share": (96, 5, 9, {"keep": 4, "prob": 0.3}),
    "tail": (60, 12, 12, {"tail": (4, 0.25)}),
    "tail, raw": (64, 12, 12, BEFORE | {"tail": (4, 0.25)}),
    "tail, sigmoid": (64, 9, 9, SIGMOID | {"tail": (3, 0.4), "scale": 1.5}),
    "tail of a pool": (64, 12, 24, {"tail": (8, 0.25)}),
    "no tail left": (64, 6, 6, {"tail": (2, 0.0)}),
    "no tail left, sqrtsoftplus": (64, 6, 6, SOFTPLUS | {"tail": (2, 0.0)}),
    "all experts": (12, 12, 12, {}),
    "k of two": (2, 1, 2, {}),
    "one expert": (1, 1, 1, BEFORE),
    "1024 experts": (1024, 8, 16, {}),
    "few, softmax": (9, 3, 5, {"scale": 1.5}),
    "few, sigmoid, tail": (9, 4, 4, SIGMOID | {"tail": (2, 0.3)}),
    "few, sqrtsoftplus, raw": (9, 2, 4, SOFTPLUS | {"normalize": False}),
    "few, softmax before, tail": (9, 4, 4, BEFORE | {"tail": (2, 0.3)}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def rule_of(name: str) -> tuple[RoutingRule, int, bool]:
    """The rule, the number of experts, and whether there is a bias."""
    experts, k, pool_max, rest = CASES[name]
    settings = {"score_function": "softmax", "normalize": True} | rest
    bias = settings.pop("bias", False)
    return RoutingRule(k=k, pool_max=pool_max, **settings), experts, bias


def random_logits(tokens: int, experts: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """[T, E]: the same numbers for every token, in another order, all different in 16 bits as well (E <= 256)."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(tokens, experts, generator=generator).argsort(dim=1)
    line = torch.linspace(-1, 1, experts) if experts > 1 else torch.zeros(1)
    values = 4 * line.sign() * line.abs() ** 1.3  # not evenly spaced, or sums of groups would be equal
    return values[places].to(dtype).to(device)


def random_numbers(tokens: int, columns: int, device: str, seed: int = 2) -> Tensor:
    """[T, columns] in [0, 1), all different within a token."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(tokens, columns, generator=generator).argsort(dim=1)
    return ((places + 0.9 * torch.rand(tokens, columns, generator=generator)) / columns).to(device)


def ranked_by(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor:
    scores_TE = selection.expert_scores(logits_TE, rule.score_function)
    if bias_E is not None:
        return scores_TE + bias_E
    return scores_TE if rule.rank_by_scores else logits_TE


def reference(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None, u_TP: Tensor) -> tuple[Any, ...]:
    """Probabilities, map, pool size, entropy, balance scores and plain map, by the functions of selection.py."""
    groups = {"num_groups": rule.num_groups, "group_topk": rule.group_topk}
    ranked_TP = selection.rank_experts(ranked_by(logits_TE, rule, bias_E), rule.pool_max, k=rule.k, **groups)
    chosen_TK, pool = ranked_TP, rule.pool or rule.k
    if rule.pool_max > rule.k:
        if rule.pool is None:
            pool = selection.draw_pool_sizes(u_TP[:, :1], rule.k, rule.pool_max, rule.prob)
        chosen_TK = selection.sample_from_pool(ranked_TP, rule.k, pool, u_TP[:, 1:], rule.keep)
    scores_TE = selection.expert_scores(logits_TE, rule.score_function)
    weights_TK = selection.combine_weights(
        logits_TE, scores_TE, chosen_TK,
        score_function=rule.score_function, normalize=rule.normalize, scale=rule.scale, tail=rule.tail,
    )  # fmt: skip
    probs_TE, map_TE = selection.to_dense(weights_TK, chosen_TK, logits_TE)
    entropy_T = token_entropy(logits_TE=logits_TE, probs_TE=selection.expert_scores(logits_TE, "softmax"))
    balance_TE = scores_TE if rule.score_function == "softmax" else scores_TE / (scores_TE.sum(-1, True) + 1e-20)
    plain_TE = selection.dense_map(ranked_TP[:, : rule.k], logits_TE.shape[1])
    return probs_TE, map_TE, pool, entropy_T, balance_TE, plain_TE


def clear_tokens(logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None) -> Tensor:
    """Tokens whose experts, and groups, are ranked by more than the rounding of sums, bool [T]."""
    values_TE = ranked_by(logits_TE.float(), rule, bias_E)
    clear_T = torch.ones(len(values_TE), dtype=torch.bool, device=values_TE.device)
    if bias_E is not None:
        sorted_TE = values_TE.sort(dim=1).values
        clear_T &= (sorted_TE.diff(dim=1) > 1e-6).all(dim=1)
    if rule.group_topk and rule.num_groups and rule.num_groups > 1:  # selection.py adds 16-bit logits up in 16 bits
        step = 1e-5 if rule.rank_by_scores else max(1e-5, 8 * torch.finfo(logits_TE.dtype).eps)
        best_TG = values_TE.unflatten(1, (rule.num_groups, -1)).topk(rule.k // rule.group_topk, dim=-1).values
        clear_T &= (best_TG.sum(dim=-1).sort(dim=1).values.diff(dim=1) > step).all(dim=1)
    return clear_T


def inputs(name: str, dtype: str, tokens: int, device: str) -> tuple[RoutingRule, Tensor, Tensor | None, Tensor]:
    rule, experts, biased = rule_of(name)
    logits_TE = random_logits(tokens, experts, DTYPES[dtype], device)
    bias_E = torch.randn(experts, generator=torch.Generator().manual_seed(3)).to(device) / 5 if biased else None
    return rule, logits_TE, bias_E, random_numbers(tokens, rule.pool_max + 1, device)


def close(ours: Tensor, wanted: Tensor, rtol: float, atol: float = 0.0) -> None:
    torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol)


def rounding(dtype: str, device: str) -> float:
    """Relative, of a number against the exact one. fp32: another order of summation, and a GPU's approximate
    exponential; else half a step of the format at least."""
    gpu = {"fp32": 5e-6, "fp16": 2.0**-10, "bf16": 2.0**-8}
    interpreter = {"fp32": 2e-6, "fp16": 2.0**-10, "bf16": 2.0**-7}  # it cuts bf16 off instead of rounding
    return (gpu if device == "cuda" else interpreter)[dtype]


def check(name: str, dtype: str, tokens: int, parts: str = "phb", device: str = "cpu") -> None:
    """Outputs, then the gradient of a random linear function of probabilities, entropy (h) and balance scores."""
    rule, logits_TE, bias_E, u_TP = inputs(name, dtype, tokens, device)
    logits_TE.requires_grad_()
    clear_T = clear_tokens(logits_TE.detach(), rule, bias_E)
    assert clear_T.float().mean() > (0.8 if dtype == "fp32" else 0.5)
    ours = router_kernel.route(logits_TE, rule, bias_E, u_TP, ALL)
    wanted = reference(logits_TE.detach(), rule, bias_E, u_TP)
    check_selection(ours, wanted, clear_T)
    check_numbers(ours, wanted, clear_T, dtype, device)
    exact_TE = logits_TE.detach().float().requires_grad_()
    weights = loss_weights(wanted, parts, device)
    ours_grad = gradient((ours.probs_TE, ours.entropy_T, ours.balance_TE), weights, logits_TE)
    exact = reference(exact_TE, rule, bias_E, u_TP)
    exact_grad = gradient((exact[0], *exact[3:5]), weights, exact_TE)
    assert ours_grad.dtype == logits_TE.dtype
    # Rounded once to the logits' dtype; the absolute part is for sums in which the terms cancel.
    close(ours_grad.float()[clear_T], exact_grad[clear_T], max(rounding(dtype, device), 1e-5), 2e-6)


def check_selection(ours: Routed, wanted: tuple[Any, ...], clear_T: Tensor) -> None:
    """Bit for bit."""
    assert ours.map_TE.dtype == torch.bool and torch.equal(ours.map_TE[clear_T], wanted[1][clear_T])
    assert torch.equal(ours.plain_TE[clear_T], wanted[5][clear_T])
    assert torch.equal(torch.as_tensor(ours.pool).long(), torch.as_tensor(wanted[2]))


def check_numbers(ours: Routed, wanted: tuple[Any, ...], clear_T: Tensor, dtype: str, device: str) -> None:
    assert ours.probs_TE.dtype == DTYPES[dtype] and not ours.probs_TE[~ours.map_TE].any()
    # Both are rounded to the dtype here, from numbers that differ a little: they may be a whole step apart.
    steps = {"bf16": 2.0**-7, "fp16": 2.0**-10}
    close(ours.probs_TE[clear_T], wanted[0][clear_T], steps.get(dtype, rounding("fp32", device)), 1e-7)
    if dtype == "fp16" or (dtype, device) == ("bf16", "cuda"):  # apart only at both sides of a rounding boundary
        assert (ours.probs_TE == wanted[0])[clear_T].float().mean() > 0.999
    close(ours.entropy_T, wanted[3], 1e-5, 2e-6)
    close(ours.balance_TE, wanted[4], rounding("fp32", device), 1e-9)


def loss_weights(outputs: tuple[Any, ...], parts: str, device: str) -> list[Tensor | None]:
    """Weights of probabilities (p), entropy (h) and balance scores (b) in a loss, those of p in 16 bits as well."""
    generator = torch.Generator().manual_seed(4)
    shapes = {"p": outputs[0].shape, "h": outputs[3].shape, "b": outputs[4].shape}
    weights = {name: torch.randn(shape, generator=generator).bfloat16().to(device) for name, shape in shapes.items()}
    return [weights[part] if part in parts else None for part in "phb"]


def gradient(outputs: tuple[Any, ...], weights: list[Tensor | None], logits_TE: Tensor) -> Tensor:
    pairs = [(tensor, weight) for tensor, weight in zip(outputs, weights, strict=True) if weight is not None]
    return torch.autograd.grad(
        [tensor for tensor, _ in pairs], logits_TE, [weight.to(tensor.dtype) for tensor, weight in pairs]
    )[0]


def check_bare(name: str, tokens: int, device: str = "cpu") -> None:
    """What is not asked for is not there, and changes nothing."""
    rule, logits_TE, bias_E, u_TP = inputs(name, "fp32", tokens, device)
    everything = router_kernel.route(logits_TE, rule, bias_E, u_TP, ALL)
    bare = router_kernel.route(logits_TE, rule, bias_E, u_TP)
    assert bare[3:] == (None, None, None)
    assert torch.equal(bare.probs_TE, everything.probs_TE) and torch.equal(bare.map_TE, everything.map_TE)


def check_equal_logits(dtype: str, tokens: int, device: str = "cpu") -> None:
    """Few different logits and random numbers: the lower expert, then the better rank, and no worse a score."""
    generator = torch.Generator().manual_seed(5)
    values_TE = torch.randint(0, 20, (tokens, 60), generator=generator) - 18.0  # mostly below 0
    signs_TE = torch.randint(0, 2, (tokens, 60), generator=generator) * 2 - 1  # 0 and -0 are equal
    logits_TE = torch.where(values_TE < 0, 0 * signs_TE.float(), values_TE).to(DTYPES[dtype]).to(device)
    u_TP = (torch.randint(0, 4, (tokens, 13), generator=generator) / 4).to(device)
    rule = RoutingRule("softmax", 5, 12, True)
    ranked_TP = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :12]
    sizes_T1 = selection.draw_pool_sizes(u_TP[:, :1], 5, 12)
    keys_TP = u_TP[:, 1:].masked_fill(torch.arange(12, device=device) >= sizes_T1, 2.0)
    places_TK = keys_TP.sort(dim=1, stable=True).indices[:, :5]
    ours = router_kernel.route(logits_TE, rule, None, u_TP, ALL)
    assert torch.equal(ours.map_TE, selection.dense_map(ranked_TP.gather(1, places_TK), 60))
    assert torch.equal(ours.plain_TE, selection.dense_map(ranked_TP[:, :5], 60))
    best_TK = logits_TE[ours.plain_TE].view(tokens, 5).sort(dim=1, descending=True).values
    assert torch.equal(best_TK, logits_TE.topk(5, dim=1).values)


def check_equal_groups(device: str = "cpu") -> None:
    """Groups with equal sums: the lower one."""
    logits_TE = torch.tensor([[1.0, 0, 2, 3, 3, 2, 0, 1, 5, 0, 2, 3]], device=device)  # best two: 1, 5, 5, 1, 5, 5
    rule = RoutingRule("softmax", 4, 4, True, num_groups=6, group_topk=2)
    ours = router_kernel.route(logits_TE, rule)
    assert ours.map_TE.nonzero()[:, 1].tolist() == [2, 3, 4, 5]


def check_rounded_scores(device: str = "cpu") -> None:
    """Sigmoids of logits above 17 are 1 in fp32. The kernel still tells them apart; selection.py cannot."""
    logits_TE = random_logits(9, 60, torch.float32, device) + 30
    rule = RoutingRule("sigmoid", 4, 4, True, rank_by_scores=True)
    assert (selection.expert_scores(logits_TE, "sigmoid") == 1).all()
    ours = router_kernel.route(logits_TE, rule)
    assert torch.equal(ours.map_TE, selection.dense_map(logits_TE.topk(4).indices, 60))
    close(ours.probs_TE[ours.map_TE], torch.full((36,), 0.25, device=device), 1e-6)


def check_extremes(score_function: str, device: str = "cpu") -> None:
    """Logits at which exponentials overflow or vanish: numbers, and those of the reference."""
    rows = [[-200.0, -200, -200, -200], [1e4, -1e4, 0, 1], [88.0, 89, -89, -103], [0.0, -0.0, 1e-30, -1e-30]]
    logits_TE = torch.tensor(rows, device=device, requires_grad=True)
    rule = RoutingRule(score_function, 3, 3, True)
    ours = router_kernel.route(logits_TE, rule, None, None, ALL)
    wanted = reference(logits_TE.detach(), rule, None, torch.zeros(4, 1))
    rtol = rounding("fp32", device)
    close(ours.probs_TE.sort(dim=1).values, wanted[0].sort(dim=1).values, rtol, 1e-7)  # equal scores: any expert
    close(ours.entropy_T, wanted[3], 1e-5, 1e-5)
    close(ours.balance_TE, wanted[4], rtol, 1e-7)
    loss = ours.probs_TE[:, 0].sum() + ours.entropy_T.sum() + ours.balance_TE[:, 1].sum()
    (grad,) = torch.autograd.grad(loss, logits_TE)
    assert grad.isfinite().all()


def check_finite_differences(name: str, device: str = "cpu") -> None:
    """(f(x + h) - f(x - h)) / 2h of a function of all outputs, at logits far enough apart for no rank to change."""
    rule, logits_TE, bias_E, u_TP = inputs(name, "fp32", 1, device)
    weights = loss_weights(reference(logits_TE, rule, bias_E, u_TP), "phb", device)

    def outputs(x_TE: Tensor) -> tuple[Any, ...]:
        ours = router_kernel.route(x_TE, rule, bias_E, u_TP, ALL)
        return ours.probs_TE, ours.entropy_T, ours.balance_TE

    def value(x_TE: Tensor) -> float:
        return sum((t.double() * w.double()).sum().item() for t, w in zip(outputs(x_TE), weights, strict=True))

    with_grad = logits_TE.clone().requires_grad_()
    grad = gradient(outputs(with_grad), weights, with_grad)
    for expert in range(logits_TE.shape[1]):
        step = torch.zeros_like(logits_TE)
        step[0, expert] = 4e-3
        slope = (value(logits_TE + step) - value(logits_TE - step)) / 8e-3
        assert abs(slope - grad[0, expert].item()) < 3e-4, expert
