"""The elastic MoE layer: output against a loop, rows dispatched, copies to the host, and elasticity off."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start

TOKENS = 16  # of each rank: hidden_states() is 8 x 2

SHARED = {"moe_shared_expert_intermediate_size": 12}
ERNIE = {"moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 12}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
AFTER = {"moe_router_pre_softmax": False}
LAYERS = {
    "softmax-before": {},
    "softmax-after": AFTER,
    "sigmoid-bias": AFTER | SIGMOID,
    "softmax-bias": ERNIE,
    "groups": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "shared-experts": SHARED,
    "gated-shared-experts": SHARED | {"moe_shared_expert_gate": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
}


@dataclass
class Pass:
    """One forward pass on one rank. handed: what permute was told to allocate, and the rows of the map it was given."""

    name: str
    k: int
    output_TD: Tensor
    probs_TE: Tensor
    map_TE: Tensor
    rows: int
    handed: tuple[Any, int]


@dataclass
class Seen:
    """All passes of one rank with its input and its part of the weights: (gate and up, down) of each expert."""

    x_TD: Tensor
    experts: list[tuple[Tensor, Tensor]]
    shared: tuple[Tensor, Tensor] | None
    shared_gate: Tensor | None
    passes: list[Pass]


def weights_of(mlp: nn.Module) -> tuple[Tensor, Tensor]:
    return mlp.linear_fc1.weight.detach(), mlp.linear_fc2.weight.detach()


def watch(layer: Any) -> dict[str, Any]:
    """The last router output, the last number of rows, and the last call of the dispatcher's permute."""
    from megatron.core.transformer.moe import token_dispatcher

    last: dict[str, Any] = {}
    permute = token_dispatcher.permute

    def spy(tokens: Tensor, routing_map: Tensor, *args: Any, **kwargs: Any) -> Any:
        last["handed"] = (kwargs["num_out_tokens"], int(routing_map.sum()))
        return permute(tokens, routing_map, *args, **kwargs)

    token_dispatcher.permute = spy
    layer.router.register_forward_hook(lambda _m, _i, out: last.update(routed=[t.detach() for t in out]))
    layer.experts.register_forward_pre_hook(lambda _m, inputs: last.update(rows=inputs[0].shape[0]))
    return last


def observe(settings: dict[str, Any], ks: tuple[int, ...], ranks: int) -> Seen:
    """Evaluation at each k', then four training passes, then evaluation as the model is configured."""
    from megatron_emoe.routing.active_k import get_active_k

    start(expert_model_parallel_size=ranks)
    layer, x = build_layer(layer_config(**settings)), hidden_states(seed=11 + torch.distributed.get_rank())
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    last, passes = watch(layer), []

    def forward(name: str, k: int) -> None:
        output = layer(x)[0].detach().flatten(0, 1)
        passes.append(Pass(name, k, output, *last["routed"], last["rows"], last["handed"]))

    layer.eval()
    for k in ks:
        with torch.no_grad(), get_active_k().evaluating(k):
            forward("evaluation", k)
    layer.train()
    for iteration in range(4):
        begin(iteration)
        forward("training", scheduled_now(layer, iteration))
    layer.eval()
    with torch.no_grad():
        forward("evaluation after training", 2)
    return Seen(x.detach().flatten(0, 1), *parts_of(layer), passes)


def scheduled_now(layer: Any, iteration: int) -> int:
    from megatron_emoe.routing.active_k import Place, scheduled_k

    return scheduled_k(layer.config, 2, Place(iteration, 0, layer=1))


def parts_of(layer: Any) -> tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None, Tensor | None]:
    shared = layer.shared_experts
    gate = getattr(shared, "gate_weight", None) if shared is not None else None
    return (
        [weights_of(expert) for expert in layer.experts.local_experts],
        None if shared is None else weights_of(shared),
        None if gate is None else gate.detach(),
    )


def naive_mlp(x_D: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    gate, up = (weights[0] @ x_D).chunk(2)
    return weights[1] @ (gate * gate.sigmoid() * up)


def naive_output(seen: Seen, experts: list[tuple[Tensor, Tensor]], one: Pass) -> Tensor:
    rows = []
    for token in range(TOKENS):
        x_D = seen.x_TD[token]
        total = torch.zeros_like(x_D)
        for expert in one.map_TE[token].nonzero().flatten().tolist():
            total += one.probs_TE[token, expert] * naive_mlp(x_D, experts[expert])
        if seen.shared is not None:
            gate = 1.0 if seen.shared_gate is None else (seen.shared_gate @ x_D).sigmoid()
            total += gate * naive_mlp(x_D, seen.shared)
        rows.append(total)
    return torch.stack(rows)


def check_passes(results: list[Seen], allgather: bool) -> None:
    """Every pass on every rank: k experts per token, the loop's output, tokens x k rows, and permute told the truth."""
    experts = [expert for seen in results for expert in seen.experts]
    for number, passes in enumerate(zip(*(seen.passes for seen in results), strict=True)):
        for seen, one in zip(results, passes, strict=True):
            assert (one.map_TE.sum(1) == one.k).all(), (number, one.name)
            torch.testing.assert_close(one.output_TD, naive_output(seen, experts, one), rtol=1e-4, atol=1e-6)
            told, needed = one.handed
            assert type(told) is int and told == needed, (number, one.name)
            assert allgather or told == TOKENS * one.k
        assert sum(one.rows for one in passes) == len(results) * TOKENS * passes[0].k


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["coactivation", "prefix"])
@pytest.mark.parametrize("name", LAYERS)
def test_output_is_the_loop_over_tokens_and_experts(name, elastic):
    ks = (1, 2, 4) if name != "softmax-after" else (2, 5, 8)
    changes = {"coactivation": COACTIVATION | {"emoe_pool_k": 4}, "prefix": PREFIX}[elastic]
    results = run_ranks(observe, 1, LAYERS[name] | changes, ks, 1)
    check_passes(results, allgather=name == "allgather")
    trained = [one.k for one in results[0].passes if one.name == "training"]
    assert (len(set(trained)) > 1) == (elastic == "prefix")


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ["coactivation", "prefix"])
def test_dispatched_rows_are_tokens_times_k_with_two_expert_ranks(dispatcher, elastic):
    changes = {"coactivation": COACTIVATION, "prefix": PREFIX}[elastic] | {"moe_token_dispatcher_type": dispatcher}
    results = run_ranks(observe, 2, changes, (1, 2, 3, 8), 2)
    assert len(results[0].experts) == 4  # of 8: each rank holds half of them
    check_passes(results, allgather=dispatcher == "allgather")


def layer_ks() -> dict[int, list[int]]:
    """Rows of two layers when k' is given for each of them by layer number."""
    from megatron_emoe.routing.active_k import get_active_k

    start()
    rows: dict[int, list[int]] = {1: [], 2: []}
    layers = [build_layer(layer_config(num_layers=2), layer_number=number).eval() for number in (1, 2)]
    for layer in layers:
        mine = rows[layer.layer_number]
        layer.experts.register_forward_pre_hook(lambda _m, inputs, mine=mine: mine.append(inputs[0].shape[0]))
    for k in ([3, 5], {2: 7}, 4, None):
        with torch.no_grad(), get_active_k().evaluating(k):
            for layer in layers:
                layer(hidden_states())
    return rows


def test_each_layer_can_have_its_own_k_in_evaluation():
    by_layer = {layer: [count // TOKENS for count in counts] for layer, counts in run_ranks(layer_ks, 1)[0].items()}
    assert by_layer == {1: [3, 2, 4, 2], 2: [5, 7, 4, 2]}


def padded_rows(settings: dict[str, Any]) -> list[tuple[int, int, Tensor]]:
    """(k, rows, rows of each expert) of training passes under a schedule that draws k."""
    start()
    layer, seen = build_layer(layer_config(**settings)), []
    layer.experts.register_forward_pre_hook(lambda _m, inputs: seen.append((inputs[0].shape[0], inputs[1])))
    for iteration in range(6):
        begin(iteration)
        output, _ = layer(hidden_states())
        assert output.isfinite().all()
    return [(scheduled_now(layer, i), rows, torch.as_tensor(each)) for i, (rows, each) in enumerate(seen)]


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["coactivation", "prefix"])
def test_capacity_and_its_padding_follow_the_drawn_k(elastic):
    changes = PREFIX | (COACTIVATION if elastic == "coactivation" else {}) | {"moe_expert_capacity_factor": 1.0}
    seen = run_ranks(padded_rows, 1, changes | {"moe_pad_expert_input_to_capacity": True})[0]
    assert len({k for k, *_ in seen}) > 2
    for k, rows, each in seen:
        limit = TOKENS * k // 8
        assert rows == 8 * limit and (each == limit).all()
    filled = set()
    for k, rows, each in run_ranks(padded_rows, 1, changes)[0]:
        assert each.max() <= TOKENS * k // 8 and rows == each.sum()
        filled |= {k} if each.max() == TOKENS * k // 8 else set()
    assert len(filled) > 2  # the limit is met, so a limit of another k would show


def quantization_padding() -> tuple[Tensor, Tensor, list[int]]:
    """Output without and with rows padded for FP8 kernels, and the rows of each expert then, under co-activation."""
    start()
    layer, x, seen = build_layer(layer_config(**COACTIVATION)), hidden_states(sequence=64), []
    layer.experts.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]))
    begin()
    plain = layer(x)[0].detach()
    for name, value in {"moe_router_padding_for_quantization": True, "fp8": "hybrid"}.items():
        setattr(layer.token_dispatcher.config, name, value)  # the dispatcher's part; the experts stay in fp32 here
    return plain, layer(x)[0].detach(), torch.as_tensor(seen[-1]).tolist()


def test_padding_for_quantization_adds_rows_and_changes_nothing():
    plain, padded, rows = run_ranks(quantization_padding, 1)[0]
    assert all(count % 16 == 0 for count in rows) and sum(rows) > 128 * 2
    torch.testing.assert_close(padded, plain)


class HostCopies(TorchDispatchMode):
    """Counts operations that make the host wait for a tensor's value, wherever they are called from."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "bincount")

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in self.WAITS or (name in ("index", "index_put_") and _has_mask(args[1])):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: list[Tensor | None]) -> bool:
    """A boolean index is turned into numbers first, and how many there are only the device knows."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


class HostReads(TorchFunctionMode):
    """Counts calls by which Python reads a tensor, but those that read the place, which is made on the host."""

    READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        name = getattr(func, "__name__", "")
        place = get_cuda_rng_tracker().states_.get("emoe-place")
        if name in self.READS and args[0] is not place:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def host_traffic(settings: dict[str, Any], stock: bool) -> tuple[Counter[str], int]:
    """What forward and backward of one training pass ask of the host, and how many operations they have."""
    from megatron_emoe.routing.metrics import get_elastic_tracker

    start(expert_model_parallel_size=2)
    layer, counts, total = build_layer(layer_config(stock, **settings)), Counter(), Counter()
    get_elastic_tracker().begin_step(0, log_interval=10, coactivation_interval=10)

    class All(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            total["operations"] += 1
            return func(*args, **(kwargs or {}))

    begin(0)
    x = hidden_states()
    with HostReads(counts), HostCopies(counts), All():
        layer(x)[0].sum().backward()
    return counts, total["operations"]


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["off", "coactivation", "prefix", "softmax-bias", "all"])
def test_no_copy_to_the_host_is_added_on_steps_that_are_not_measured(elastic):
    plain = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01}
    changes = {
        "off": {},
        "coactivation": COACTIVATION,
        "prefix": PREFIX,
        "softmax-bias": {"moe_router_enable_expert_bias": True},
        "all": PREFIX | COACTIVATION | {"moe_router_enable_expert_bias": True, "emoe_hr_loss_coeff": 0.1},
    }[elastic]
    stock, stock_operations = run_ranks(host_traffic, 2, plain, True)[0]
    ours, operations = run_ranks(host_traffic, 2, plain | changes, False)[0]
    assert stock["tolist"] > 0 and stock_operations > 100  # the counters see the core's own copies
    assert ours == stock
    if elastic in ("off", "prefix"):
        assert operations == stock_operations  # not a single operation more
    else:
        assert operations != stock_operations  # the elastic path did run


def compare_off(settings: dict[str, Any], passes: int) -> list[str]:
    """Names of what differs between a stock layer and an elastic one with everything off, bit by bit."""
    start(expert_model_parallel_size=2)
    layers = [build_layer(layer_config(stock, **settings)) for stock in (True, False)]
    assert [type(layer).__name__ for layer in layers] == ["MoELayer", "ElasticMoELayer"]
    different = []
    for iteration in range(passes):
        begin(iteration)
        seen = []
        for layer in layers:
            x = hidden_states(seed=iteration)
            torch.cuda.manual_seed(iteration)  # input jitter draws from it
            output = layer(x)[0]
            output.square().sum().backward()
            gradients = {name: p.grad for name, p in layer.named_parameters()}
            seen.append({"output": output, "input gradient": x.grad} | gradients | dict(layer.named_buffers()))
        assert seen[0].keys() == seen[1].keys() and len(seen[0]) > 10
        different += [name for name in seen[0] if not torch.equal(seen[0][name], seen[1][name])]
    return different


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1},
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
        {"moe_router_load_balancing_type": ["global_aux_loss", "aux_loss"], "moe_aux_loss_coeff": [0.1, 0.2]} | AFTER,
        AFTER | SIGMOID | {"moe_router_num_groups": 4, "moe_router_group_topk": 2},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
        SHARED | {"moe_token_dispatcher_type": "allgather", "moe_input_jitter_eps": 0.1},
        {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
        {"moe_router_dtype": "fp64", "calculate_per_token_loss": True, "moe_z_loss_coeff": 0.01},
    ],
    ids=lambda settings: "-".join(map(str, settings)).replace("moe_", "")[:60],
)
def test_with_everything_off_the_layer_is_bit_identical_to_the_core_s(settings):
    assert run_ranks(compare_off, 2, settings, 3) == [[], []]
