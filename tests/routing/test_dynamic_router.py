"""The baselines' routers against naive loops over tokens, and their losses against their formulas.

One rank, or two that share the tokens; real core.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_emoe.routing.noisy_topk import noise_deviation
from tests.distributed import run_ranks
from tests.routing.test_noisy_topk import naive_load
from tests.tiny import begin, build_layer, hidden_states, layer_config, start

EXPERTS = 8
TOP_P = {"emoe_selection": "top-p"}
NULL = {"emoe_selection": "null-experts", "emoe_null_experts": 4, "moe_router_topk": 3}
NOISY = {"emoe_selection": "noisy-topk"}
CASES: dict[str, dict[str, Any]] = {
    "top-p": TOP_P,
    "top-p of .8": TOP_P | {"emoe_top_p": 0.8},
    "top-p of .8, two at most": TOP_P | {"emoe_top_p": 0.8, "emoe_top_p_max": 2},
    "top-p, renormalised": TOP_P | {"emoe_combine": "renormalize", "moe_router_pre_softmax": False},
    "top-p, scaled": TOP_P | {"moe_router_topk_scaling_factor": 2.5},
    "null": NULL,
    "null, raw": NULL | {"emoe_combine": "raw"},
    "null, scaled": NULL | {"moe_router_topk_scaling_factor": 2.5, "moe_router_pre_softmax": False},
}


def router_of(settings: dict[str, Any]) -> Any:
    """A router whose added weight, too, makes a difference."""
    router = build_layer(layer_config(**settings)).router
    if "null_weight" in dict(router.named_parameters()):
        router.null_weight.data *= 30
    if "noise_weight" in dict(router.named_parameters()):
        assert router.noise_weight.abs().max() == 0  # as the paper starts it
        router.noise_weight.data.normal_(generator=torch.Generator().manual_seed(4))
    return router


def weights_of(router: Any) -> Tensor:
    """The router's weight with the null experts' or the noise's below it, fp64."""
    return torch.cat([weight.detach() for weight in router.parameters()]).double()


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(x - max(row)) for x in row]
    return [e / sum(exps) for e in exps]


def naive_choice(q: list[float], settings: dict[str, Any], k: int | None) -> list[int]:
    """Columns of one token. k: asked for, or None."""
    ranking = sorted(range(len(q)), key=lambda i: -q[i])
    if settings["emoe_selection"] == "null-experts":
        return ranking[: k or settings["moe_router_topk"]]
    if k:
        return ranking[:k]
    chosen, p, most = [], settings.get("emoe_top_p", 0.4), settings.get("emoe_top_p_max", EXPERTS)
    while sum(q[i] for i in chosen) < p and len(chosen) < most:
        chosen.append(ranking[len(chosen)])
    return chosen


def naive_token(row: list[float], settings: dict[str, Any], k: int | None) -> dict[int, float]:
    """Weights of one token's true experts."""
    q = softmax(row)
    chosen = [i for i in naive_choice(q, settings, k) if i < EXPERTS]
    null = settings["emoe_selection"] == "null-experts"
    rule = settings.get("emoe_combine", "renormalize" if null else "raw")
    total = sum(q[i] for i in chosen) if rule == "renormalize" else 1.0
    return {i: q[i] / total * settings.get("moe_router_topk_scaling_factor", 1.0) for i in chosen}


def route_all() -> dict[tuple[str, int | None | str], tuple[Tensor, Tensor, Tensor]]:
    """(case, k' or "training") -> logits, probabilities, map."""
    from megatron_emoe.routing.active_k import get_active_k

    start()
    x, results = hidden_states(sequence=32), {}
    for name, settings in CASES.items():
        router = router_of(settings)
        logits = (x.detach().flatten(0, 1).double() @ weights_of(router).t()).double()
        begin()
        results[name, "training"] = (logits, *(t.detach() for t in router(x)))
        router.eval()
        for k in (None, 1, 3, 6):
            with torch.no_grad(), get_active_k().evaluating(k):
                results[name, k] = (logits, *router(x))
    return results


@pytest.fixture(scope="module")
def routed() -> dict[tuple[str, int | None | str], tuple[Tensor, Tensor, Tensor]]:
    return run_ranks(route_all, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_experts_and_weights_are_the_naive_ones_in_training_and_at_every_k(name, routed):
    for k in ("training", None, 1, 3, 6):
        logits, probs, used = routed[name, k]
        for token, row in enumerate(logits.tolist()):
            wanted = naive_token(row, CASES[name], None if k == "training" else k)
            assert set(used[token].nonzero().flatten().tolist()) == set(wanted), (k, token)
            for expert in range(EXPERTS):
                assert probs[token, expert].item() == pytest.approx(wanted.get(expert, 0.0), rel=1e-4), (k, token)
    counts = routed[name, None][2].sum(1)
    assert len(set(counts.tolist())) > 1  # tokens differ, or the case shows nothing
    if "null" in name:
        assert set(routed[name, 1][2].sum(1).tolist()) == {0, 1}  # a token may have no expert at all


def loss_gradient(
    settings: dict[str, Any], padded: list[int], context: int = 1, silent: bool = False
) -> dict[str, Any]:
    """One training pass through a router whose output is of no weight: all gradient is the losses'.

    padded: how many tokens at the end of each of two sequences are padding. context: ranks that share the sequences.
    silent: all noise is zero; ranks with other tokens draw other noise.
    """
    from megatron_emoe.routing import dynamic_router
    from megatron_emoe.routing.metrics import get_elastic_tracker

    start(context_parallel_size=context)
    if silent:
        dynamic_router.normal_numbers = lambda rows, columns, seed, device: torch.zeros(rows, columns)
    tracker = get_elastic_tracker()
    tracker.begin_step(0, log_interval=1, coactivation_interval=0)
    router, x = router_of(settings | {"context_parallel_size": context}), hidden_states()
    mask = torch.zeros(8, 2, dtype=torch.bool)
    for column, count in enumerate(padded):
        mask[8 - count :, column] = True
    part = torch.arange(8).chunk(context)[torch.distributed.get_rank()]
    begin(5, 2)
    probs, used = router(x[part], mask[part] if padded else None)
    (probs * 0).sum().backward()
    gradient = torch.cat([parameter.grad for parameter in router.parameters()])
    values = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    return {
        "x": x.detach().flatten(0, 1),
        "valid": ~mask.flatten(),
        "used": used,
        "probs": probs.detach(),
        "gradient": gradient.double(),
        "weight": weights_of(router),
        "values": values,
        "sums": tracker._sums,
    }


def wanted_gradient(loss: Callable[[Tensor], Tensor], seen: dict[str, Any]) -> Tensor:
    weight = seen["weight"].clone().requires_grad_()
    return torch.autograd.grad(loss(seen["x"].double()[seen["valid"]] @ weight.t()), weight)[0]


BALANCE = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}


@pytest.mark.parametrize("padded", [[], [3, 1]])
def test_the_losses_of_top_p(padded):
    settings = TOP_P | BALANCE | {"emoe_top_p": 0.8, "emoe_entropy_loss_coeff": 0.3, "moe_z_loss_coeff": 0.02}
    seen = run_ranks(loss_gradient, 1, settings, padded)[0]

    def balance(q: Tensor) -> Tensor:
        """E sum_i f_i Q_i: f_i the share of the tokens that use expert i, Q_i its mean probability."""
        shares = seen["used"][seen["valid"]].double().mean(0)
        return EXPERTS * sum(shares[i] * q[:, i].mean() for i in range(EXPERTS))

    def loss(logits: Tensor) -> Tensor:
        q = logits.softmax(-1)
        entropy = -(q * q.log()).sum(-1).mean()
        return 0.1 * balance(q) + 0.3 * entropy + 0.02 * logits.logsumexp(-1).square().mean()

    torch.testing.assert_close(seen["gradient"], wanted_gradient(loss, seen), rtol=1e-4, atol=1e-7)
    q = (seen["x"].double()[seen["valid"]] @ seen["weight"].t()).softmax(-1)
    assert seen["values"]["load_balancing_loss"].item() == pytest.approx(balance(q).item(), rel=1e-5)
    mean = seen["used"][seen["valid"]].sum(1).double().mean().item()
    assert seen["sums"][1]["active k"].item() == pytest.approx(mean) and mean != 2


def test_the_entropy_loss_has_the_paper_s_weight():
    one = run_ranks(loss_gradient, 1, TOP_P, [])[0]
    ten_thousand = run_ranks(loss_gradient, 1, TOP_P | {"emoe_entropy_loss_coeff": 1.0}, [])[0]
    torch.testing.assert_close(one["gradient"] * 1e4, ten_thousand["gradient"], rtol=1e-3, atol=1e-6)
    assert one["gradient"].abs().max() > 1e-6


@pytest.mark.parametrize("padded", [[], [3, 1]])
def test_null_experts_are_balanced_as_a_whole(padded):
    seen = run_ranks(loss_gradient, 1, NULL | BALANCE, padded)[0]

    def balance(logits: Tensor) -> Tensor:
        """(E + N) sum_j f_j P_j: f_j the share of the T x k picks, the null experts' shared evenly among them."""
        q, picks = logits.softmax(-1), torch.zeros(12, dtype=torch.float64)
        for row in q.tolist():
            for column in sorted(range(12), key=lambda i: -row[i])[:3]:
                picks[column] += 1
        picks[8:] = sum(picks[8:].tolist()) / 4
        return 12 * sum(picks[j] / (len(q) * 3) * q[:, j].mean() for j in range(12))

    torch.testing.assert_close(
        seen["gradient"], wanted_gradient(lambda logits: 0.1 * balance(logits), seen), rtol=1e-4, atol=1e-7
    )
    value = balance(seen["x"].double()[seen["valid"]] @ seen["weight"].t())
    assert seen["values"]["load_balancing_loss"].item() == pytest.approx(value.item(), rel=1e-5)
    assert seen["gradient"][8:].abs().max() > 1e-5  # it reaches the null experts
    mean = seen["used"][seen["valid"]].sum(1).double().mean().item()
    assert seen["sums"][1]["active k"].item() == pytest.approx(mean)


def noise_at(seed: int) -> Tensor:
    from megatron_emoe.routing.noisy_topk import normal_numbers

    return normal_numbers(16, EXPERTS, seed, torch.device("cpu"))


def place_seed() -> int:
    """The seed of layer 1 at iteration 5, micro-batch 2, for the first shard of the tokens."""
    from megatron_emoe.routing.active_k import Place, draw_for, mix
    from megatron_emoe.settings.elastic_config import ElasticConfig

    return mix(draw_for(ElasticConfig(**NOISY), 2, Place(5, 2, 1)).seed, 0)


@pytest.mark.slow
@pytest.mark.parametrize("combine", ["renormalize", "model"])
@pytest.mark.parametrize("padded", [[], [3, 1]])
def test_noisy_top_k_and_its_losses(combine, padded):
    settings = NOISY | {"emoe_combine": combine, "emoe_load_loss_coeff": 0.2}
    seen = run_ranks(loss_gradient, 1, settings, padded)[0]
    normal = noise_at(place_seed()).double()

    def noisy(raw: Tensor, normal_TE: Tensor) -> tuple[Tensor, Tensor]:
        deviation = torch.nn.functional.softplus(raw[:, EXPERTS:])
        return raw[:, :EXPERTS] + normal_TE * deviation, deviation

    def gates(h: Tensor) -> Tensor:
        """Softmax over the k kept logits, as in the paper; or the model's own rule, which here is before the choice."""
        kept = h.topk(2, dim=1).indices
        if combine == "renormalize":
            return torch.zeros_like(h).scatter(1, kept, h.gather(1, kept).softmax(-1))
        q = h.softmax(-1)
        return torch.zeros_like(h).scatter(1, kept, q.gather(1, kept))

    def variation(values: Tensor) -> Tensor:
        return values.var(unbiased=False) / values.mean().square()

    def losses(raw: Tensor) -> tuple[Tensor, Tensor]:
        h, deviation = noisy(raw, normal[seen["valid"]])
        load = []
        for token in range(len(h)):
            for i in range(EXPERTS):
                others = torch.cat([h[token, :i], h[token, i + 1 :]])
                load.append(torch.special.ndtr((raw[token, i] - others.topk(2).values[1]) / deviation[token, i]))
        return variation(gates(h).sum(0)), variation(torch.stack(load).view(-1, EXPERTS).sum(0))

    h, deviation = noisy(seen["x"].double() @ seen["weight"].t(), normal)
    torch.testing.assert_close(seen["probs"].double(), gates(h), rtol=1e-4, atol=1e-6)
    assert torch.equal(seen["used"], gates(h) > 0)
    wanted = wanted_gradient(lambda raw: 0.1 * losses(raw)[0] + 0.2 * losses(raw)[1], seen)
    torch.testing.assert_close(seen["gradient"], wanted, rtol=1e-3, atol=1e-6)
    assert seen["gradient"][EXPERTS:].abs().max() > 1e-5  # the noise learns too
    importance, load = losses(seen["x"].double()[seen["valid"]] @ seen["weight"].t())
    sums = seen["sums"][1]
    assert sums["importance loss"].item() == pytest.approx(importance.item(), rel=1e-4)
    assert sums["load loss"].item() == pytest.approx(load.item(), rel=1e-4)
    clean = (seen["x"].double() @ seen["weight"].t())[seen["valid"], :EXPERTS]
    naive = torch.tensor(naive_load(clean, h[seen["valid"]], deviation[seen["valid"]], 2)).sum(0)
    assert load.item() == pytest.approx(variation(naive).item(), rel=1e-4)


SHARED = {
    "top-p": TOP_P | BALANCE | {"emoe_entropy_loss_coeff": 0.3},
    "null": NULL | BALANCE,
    "noisy": NOISY,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_that_share_the_sequences_have_the_loss_of_one(name):
    whole = run_ranks(loss_gradient, 1, SHARED[name], [], 1, True)[0]
    halves = run_ranks(loss_gradient, 2, SHARED[name], [], 2, True)
    assert torch.equal(torch.cat([half["used"] for half in halves]), whole["used"])
    assert whole["gradient"].abs().max() > 1e-4
    torch.testing.assert_close(sum(half["gradient"] for half in halves), whole["gradient"], rtol=1e-3, atol=1e-7)


def noise_places(changes: dict[str, Any]) -> dict[str, Tensor]:
    """Maps of the same tokens at different places, and in evaluation."""
    start()
    x, maps = hidden_states(sequence=32), {}
    router = router_of(NOISY | changes)
    for name, place in {"first": (3, 1), "iteration": (4, 1), "microbatch": (3, 2), "again": (3, 1)}.items():
        torch.manual_seed(len(maps))  # no random state has a say
        begin(*place)
        maps[name] = router(x)[1]
    router.set_layer_number(2)
    maps["layer"] = router(x)[1]
    router.eval()
    with torch.no_grad():
        maps["evaluation"] = router(x)[1]
    clean = x.detach().flatten(0, 1) @ router.weight.detach().t()
    maps["clean"] = torch.zeros(64, EXPERTS, dtype=torch.bool).scatter_(1, clean.topk(2, dim=1).indices, True)
    return maps


def test_noise_follows_from_the_place_alone_and_only_training_has_it():
    maps, other_seed = (run_ranks(noise_places, 1, changes)[0] for changes in ({}, {"emoe_seed": 9}))
    assert torch.equal(maps["first"], maps["again"])
    for name in ("iteration", "microbatch", "layer", "clean"):
        assert not torch.equal(maps["first"], maps[name]), name
    assert not torch.equal(maps["first"], other_seed["first"])
    assert torch.equal(maps["evaluation"], maps["clean"]) and torch.equal(other_seed["evaluation"], maps["clean"])
    assert noise_deviation(torch.zeros(1)).item() == pytest.approx(math.log(2))


class Operations(TorchDispatchMode):
    """The names of all that torch runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **kwargs or {})


def operations(settings: dict[str, Any]) -> list[str]:
    start()
    router, x = router_of(settings), hidden_states()
    begin()
    with Operations() as seen:
        router(x)
    return seen.names


@pytest.mark.parametrize("name", SHARED)
def test_training_copies_nothing_from_the_host(name):
    names = run_ranks(operations, 1, SHARED[name])[0]
    assert "aten::topk" in names or "aten::sort" in names
    assert "aten::lift_fresh" not in names  # what torch.tensor(number, device=...) begins with


def tail_asked() -> str:
    from megatron_emoe.routing.active_k import get_active_k

    start()
    router = router_of(TOP_P).eval()
    owner = get_active_k()
    with pytest.raises(ValueError) as error, owner.evaluating(4), owner.scaling_tail(0.5):
        router(hidden_states())
    return str(error.value)


def test_a_tail_scale_has_no_meaning_there():
    assert run_ranks(tail_asked, 1)[0] == "tail scale 0.5: has no meaning with --emoe-selection top-p"
