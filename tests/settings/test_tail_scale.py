"""The tail scale against hand arithmetic, plain top-k and plain top-k'."""

import json
import math

import pytest
import torch

from megatron_emoe.model.checkpoint import fitted_tail_scale
from megatron_emoe.routing import selection
from megatron_emoe.routing.active_k import ActiveK, Place, draw_for
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE, parse_tail_scale, tail_scale_words
from tests.distributed import run_ranks
from tests.tiny import build_layer, hidden_states, layer_config, start

MODES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False), ("sqrtsoftplus", True)]


def test_one_number_holds_at_every_k():
    scale = parse_tail_scale(["0.25"])
    assert [scale.at(k) for k in (3, 6, 64)] == [0.25, 0.25, 0.25]


def test_a_table_is_linear_between_its_entries_and_constant_outside():
    scale = parse_tail_scale(["12:0.1", "6:0.4"])  # any order
    # 8 is a third of the way from 6 to 12: 0.4 - 0.3 / 3 = 0.3.
    assert [scale.at(k) for k in (5, 6, 12, 20)] == [0.4, 0.4, 0.1, 0.1]
    assert scale.at(8) == pytest.approx(0.3)
    assert scale.at(9) == pytest.approx(0.25)


def test_words_of_a_table_are_read_back():
    table = {6: 0.25, 8: 1e-3, 12: 0.0}
    assert dict(parse_tail_scale(tail_scale_words(table)).table) == table


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must be one number, or pairs"),
        (["a"], "a: must be a finite number of at least 0"),
        (["-0.1"], "-0.1: must be a finite number"),
        (["inf"], "inf: must be a finite number"),
        (["nan"], "nan: must be a finite number"),
        (["0.1", "0.2"], "0.1: must be one number, or pairs"),
        (["6:0.1", "0.2"], "0.2: must be one number, or pairs"),
        (["6:0.1", "6:0.2"], "6:0.2: k' = 6 is given twice"),
        (["x:0.1"], "x:0.1: must be one number, or pairs"),
        (["6:"], "6:: must be a finite number"),
    ],
)
def test_refused_words(words, message):
    with pytest.raises(ValueError, match=message):
        parse_tail_scale(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["2:0.5"], r"--emoe-tail-scale 2:0.5: k' must lie in \[3, 8\], above k"),
        (["9:0.5"], r"--emoe-tail-scale 9:0.5: k' must lie in \[3, 8\], above k"),
        (["half"], "--emoe-tail-scale half: must be a finite number"),
    ],
)
def test_refused_for_a_model(words, message):
    with pytest.raises(ValueError, match=message):
        validate_elastic(ElasticConfig(emoe_tail_scale=words), model_k=2, num_experts=8)


def weights(logits_TE: torch.Tensor, k: int, mode: tuple[str, bool], tail: tuple[int, float] | None) -> torch.Tensor:
    function, normalize = mode
    scores_TE = selection.expert_scores(logits_TE, function)
    indices_TK = scores_TE.topk(k, dim=1).indices
    return selection.combine_weights(
        logits_TE, scores_TE, indices_TK, score_function=function, normalize=normalize, scale=None, tail=tail
    )


def some_logits(tokens: int = 32, experts: int = 8) -> torch.Tensor:
    return torch.randn(tokens, experts, generator=torch.Generator().manual_seed(3)) * 2


def test_by_hand():
    # Scores 4, 2, 1, 1 (logits are their logarithms), k = 2, k' = 4, a = 1/4: 4, 2, 1/4, 1/4 sum to 6.5.
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    expected = torch.tensor([[4 / 6.5, 2 / 6.5, 0.25 / 6.5, 0.25 / 6.5]])
    torch.testing.assert_close(weights(logits, 4, ("softmax", True), (2, 0.25)), expected)
    # Without renormalisation the softmax over all (here 8 in sum) stays: 4/8, 2/8, 0.25/8, 0.25/8.
    expected = torch.tensor([[4 / 8, 2 / 8, 0.25 / 8, 0.25 / 8]])
    torch.testing.assert_close(weights(logits, 4, ("softmax", False), (2, 0.25)), expected)


@pytest.mark.parametrize("mode", MODES)
def test_zero_is_plain_top_k_and_one_is_plain_top_k_prime(mode):
    logits = some_logits()
    none = weights(logits, 6, mode, (2, 0.0))
    torch.testing.assert_close(none[:, :2], weights(logits, 2, mode, None))
    assert not none[:, 2:].any()
    torch.testing.assert_close(weights(logits, 6, mode, (2, 1.0)), weights(logits, 6, mode, None))


@pytest.mark.parametrize("mode", MODES)
def test_against_a_naive_loop_and_its_gradient(mode):
    function, normalize = mode
    logits = some_logits(4).double().requires_grad_()
    mixing = torch.randn(4, 5, generator=torch.Generator().manual_seed(4))
    total = torch.zeros((), dtype=torch.float64)
    for row, coefficients in zip(logits, mixing, strict=True):
        scores = {"softmax": row.exp() / row.exp().sum(), "sigmoid": 1 / (1 + (-row).exp())}
        scores["sqrtsoftplus"] = (1 + row.exp()).log().sqrt()
        best = sorted(scores[function], key=lambda score: -score.item())[:5]
        scaled = [score if rank < 2 else score * 0.3 for rank, score in enumerate(best)]
        divisor = sum(scaled) if normalize else 1
        total = total + sum(c * score / divisor for c, score in zip(coefficients, scaled, strict=True))
    (expected,) = torch.autograd.grad(total, logits)
    ours = logits.detach().float().requires_grad_()
    loss = (weights(ours, 5, mode, (2, 0.3)) * mixing).sum()
    (gradient,) = torch.autograd.grad(loss, ours)
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    torch.testing.assert_close(gradient, expected.float(), atol=1e-5, rtol=1e-4)


def test_the_owner_of_k_scales_above_the_models_own_k_only():
    elastic = ElasticConfig(emoe_tail_scale=["4:0.5", "6:0.25"])
    owner = ActiveK()
    for k, expected in ((1, 1.0), (2, 1.0), (4, 0.5), (5, 0.375), (8, 0.25)):
        with owner.evaluating(k):
            assert owner.draw(elastic, 2, layer=1, training=False).tail == expected
            with owner.scaling_tail(0.75):
                assert owner.draw(elastic, 2, layer=1, training=False).tail == (0.75 if k > 2 else 1.0)
    assert owner.draw(elastic, 2, layer=1, training=False).tail == 1.0


def test_training_scales_the_draws_above_k():
    elastic = ElasticConfig(
        emoe_selection="prefix", emoe_k_schedule="uniform", emoe_k_min=1, emoe_k_max=4, emoe_tail_scale=["0.5"]
    )
    draws = [draw_for(elastic, 2, Place(iteration, 0, 1)) for iteration in range(64)]
    assert {(draw.k, draw.tail) for draw in draws} == {(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)}


def test_a_table_beside_a_checkpoint(tmp_path):
    assert fitted_tail_scale(tmp_path) is None
    path = tmp_path / TAIL_SCALE_FILE
    path.write_text(json.dumps({"tail_scale": {"6": 0.25, "12": 0.1}}))
    assert fitted_tail_scale(tmp_path) == ["6:0.25", "12:0.1"]
    for text in ("", "[]", '{"tail_scale": {"a": 1}}', '{"tail_scale": [1]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{TAIL_SCALE_FILE}: not a table of the tail scale"):
            fitted_tail_scale(tmp_path)


# The pool's three ablations, on ranked pools 0, 1, 2, ... where an expert's number is its rank from 0.


def sampled(k: int, pool_max: int, tokens: int = 40_000, **settings) -> tuple[torch.Tensor, torch.Tensor | int]:
    ranked = torch.arange(pool_max).expand(tokens, -1)
    return selection.coactivation_indices(ranked, k, pool=settings.pop("pool", None), seed=5, **settings)


def test_kept_ranks_are_always_there_and_the_rest_is_uniform():
    # k = 3, keep 2, a pool of 6: ranks 0 and 1, and one of ranks 2 to 5 with probability 1/4 each.
    chosen, _ = sampled(3, 6, pool=6, keep=2)
    assert (chosen[:, 0] == 0).all()
    assert (chosen[:, 1] == 1).all()
    shares = torch.bincount(chosen[:, 2], minlength=6) / len(chosen)
    sigma = math.sqrt(0.25 * 0.75 / len(chosen))
    assert shares.tolist() == pytest.approx([0, 0, 0.25, 0.25, 0.25, 0.25], abs=5 * sigma)


def test_a_share_of_the_tokens_samples():
    # With probability 0.4 a size of {2, ..., 6} (0.08 each), else 2: 0.6 + 0.08 = 0.68 at 2.
    _, sizes = sampled(2, 6, prob=0.4)
    shares = torch.bincount(sizes.flatten(), minlength=7) / len(sizes)
    assert shares.tolist() == pytest.approx([0, 0, 0.68, 0.08, 0.08, 0.08, 0.08], abs=5 * math.sqrt(0.25 / len(sizes)))


def test_pool_sizes_of_a_share_at_the_ends_of_the_unit_interval():
    below = torch.nextafter(torch.tensor([0.3]), torch.tensor([0.0]))
    u = torch.cat([torch.tensor([0.0]), below, torch.tensor([0.3, 1 - 2**-24])]).unsqueeze(1)
    assert selection.draw_pool_sizes(u, 2, 6, 0.3).flatten().tolist() == [2, 6, 2, 2]


def elastic_pool(**settings) -> ElasticConfig:
    return ElasticConfig(emoe_selection="coactivation", emoe_pool_k=6, **settings)


def test_a_share_of_the_steps_samples():
    elastic = elastic_pool(emoe_pool_draw="step", emoe_pool_prob=0.5)
    pools = [draw_for(elastic, 2, Place(iteration, 0, 1)).pool for iteration in range(4000)]
    # 0.5 + 0.5 / 5 = 0.6 at 2, 0.1 at each of 3 to 6.
    shares = [pools.count(m) / len(pools) for m in range(2, 7)]
    assert shares == pytest.approx([0.6, 0.1, 0.1, 0.1, 0.1], abs=5 * math.sqrt(0.25 / len(pools)))


def test_the_pool_grows_while_it_is_annealed_in():
    elastic = elastic_pool(emoe_pool_anneal_iters=8)
    largest = [draw_for(elastic, 2, Place(iteration, 0, 1)).pool_max for iteration in (0, 1, 2, 4, 6, 8, 99)]
    assert largest == [2, 2, 3, 4, 5, 6, 6]  # 2 + round(4 i / 8); Python rounds 2.5 down and 3.0 exactly


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emoe_pool_keep": 2}, r"--emoe-pool-keep 2: must lie in \[0, 1\], below the smallest k"),
        ({"emoe_pool_prob": 0.0}, r"--emoe-pool-prob 0.0: must lie in \(0, 1\]"),
        ({"emoe_pool_anneal_iters": -1}, "--emoe-pool-anneal-iters -1: must be at least 0"),
        ({"emoe_pool_prob": 0.5, "emoe_pool_fixed": True}, "--emoe-pool-prob 0.5: has no meaning with"),
    ],
)
def test_refused_pools(settings, message):
    with pytest.raises(ValueError, match=message):
        validate_elastic(elastic_pool(**settings), model_k=2, num_experts=8)


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
ZERO_IS_TOP_K = {
    "softmax": ({}, True),
    "sigmoid": (SIGMOID, True),
    "sigmoid at k = 1": (SIGMOID | {"moe_router_topk": 1}, False),
    "group limits": ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, False),
    "capacity": ({"moe_expert_capacity_factor": 0.5}, False),
}


def zero_beside_top_k() -> dict[str, bool]:
    """Whether a router at k' = 4 and a = 0 gives the weights of plain top-k, for every case."""
    from megatron_emoe.routing.active_k import get_active_k

    start()
    found, owner = {}, get_active_k()
    for name, (settings, _) in ZERO_IS_TOP_K.items():
        router, x = build_layer(layer_config(**settings)).router.eval(), hidden_states(sequence=32)
        with torch.no_grad(), owner.scaling_tail(0.0):
            plain = router(x)[0]
            with owner.evaluating(4):
                found[name] = torch.allclose(router(x)[0], plain, atol=1e-6)
    return found


def test_where_zero_is_plain_top_k():
    assert run_ranks(zero_beside_top_k, 1)[0] == {name: same for name, (_, same) in ZERO_IS_TOP_K.items()}
