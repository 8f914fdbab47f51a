"""The dense MLP with low-rank experts: against a loop over tokens and experts, its start, and two tensor ranks."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, hidden_states, layer_config, start

EXPERTS, RANK = 8, 3
LORA = {"num_moe_experts": EXPERTS, "emoe_lora_experts": EXPERTS, "emoe_lora_rank": RANK, "emoe_lora_alpha": 4.5}
DENSE = {"moe_token_dispatcher_type": "allgather", "moe_ffn_hidden_size": 32, "moe_router_pre_softmax": False}
AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "emoe_hr_loss_coeff": 0.2}
STRATIFIED = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_budget_scales": True}
MODES: dict[str, dict[str, Any]] = {
    "topk": AUX,
    "raw": {"emoe_combine": "raw"},
    "coactivation": COACTIVATION | AUX,
    "prefix": PREFIX | {"emoe_k_min": 2, "emoe_tail_scale": ["0.25"]},
    "stratified": STRATIFIED,
    "top-p": {"emoe_selection": "top-p", "emoe_top_p": 0.6},
    "null-experts": {"emoe_selection": "null-experts", "emoe_null_experts": 4},
    "noisy-topk": {"emoe_selection": "noisy-topk"},
    "with a bias": {"add_bias_linear": True, "gated_linear_unit": False, "activation_func": nn.functional.gelu},
}
EVALUATED = (1, 2, 4, 6)


class Compared(NamedTuple):
    """Output and gradients of the layer, and of the loop over its experts, by name."""

    layer: dict[str, Tensor]
    loop: dict[str, Tensor]
    counts: set[int]


def build(**changes: Any) -> Any:
    """A LoraMLP in training mode, whose B are no longer zero."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_emoe.model.layer_spec import lora_layer

    config = layer_config(**(LORA | DENSE | changes))
    torch.manual_seed(5)
    mlp = lora_layer(get_gpt_layer_local_spec()).submodules.mlp(
        config=config, pg_collection=get_default_pg_collection()
    )
    mlp.set_layer_number(1)
    mlp.router.weight.data *= 30.0  # its ranks are as clear as those of a trained one
    for number, name in enumerate(("linear_fc1", "linear_fc2")):
        getattr(mlp.lora, name).b.data.copy_(whole_b(mlp, name, number))
    return mlp.train()


def whole_b(mlp: Any, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(getattr(mlp.lora, name).b.shape, generator=generator) / 4


def loop(mlp: Any, x_TD: Tensor, weights_TE: Tensor) -> Tensor:
    """The MLP with each expert of each linear layer by itself: W x + b + sum over e of w_e alpha / R B_e A_e x."""

    def layer(name: str, inputs: Tensor) -> Tensor:
        base, experts = getattr(mlp, name), getattr(mlp.lora, name)
        bias = base.bias if mlp.config.add_bias_linear else 0.0
        rows = []
        for x, weights in zip(inputs, weights_TE, strict=True):
            row = base.weight @ x + bias * (name == "linear_fc1")
            for expert, weight in enumerate(weights):
                own = slice(expert * RANK, (expert + 1) * RANK)
                row = row + weight * (4.5 / 3) * (experts.b[:, own] @ (experts.a[own] @ x))
            rows.append(row)
        return torch.stack(rows)

    middle = layer("linear_fc1", x_TD)
    if mlp.config.gated_linear_unit:
        gate, up = middle.chunk(2, dim=-1)
        middle = nn.functional.silu(gate) * up
    else:
        middle = nn.functional.gelu(middle)
    return layer("linear_fc2", middle)


def compare(mlp: Any) -> Compared:
    routed: list[tuple[Tensor, Tensor]] = []
    hook = mlp.router.register_forward_hook(lambda _router, _inputs, output: routed.append(output))
    hidden = hidden_states()
    output, bias = mlp(hidden)
    hook.remove()
    assert (bias is None) != mlp.config.add_bias_linear
    weights_TE, map_TE = routed[0]
    by_loop = loop(mlp, hidden.flatten(0, 1), weights_TE).view_as(output)
    generator = torch.Generator().manual_seed(3)
    upstream = torch.randn(output.shape, generator=generator)
    asked = {name: p for name, p in mlp.named_parameters() if name.startswith(("lora", "router"))} | {"x": hidden}
    sides = []
    for value in (output, by_loop):
        found = torch.autograd.grad(value, list(asked.values()), upstream, retain_graph=True, allow_unused=True)
        gradients = {name: g for name, g in zip(asked, found, strict=True) if g is not None}
        sides.append({"output": value.detach()} | gradients)
    return Compared(*sides, set(map_TE.sum(1).tolist()))


def every_mode() -> dict[str, Compared]:
    from megatron_emoe.routing.active_experts import active_experts

    start()
    begin()
    found = {name: compare(build(**changes)) for name, changes in MODES.items()}
    mlp = build().eval()
    for k in EVALUATED:
        with active_experts(mlp, k):
            found[f"k' = {k}"] = compare(mlp)
    return found


@pytest.fixture(scope="module")
def modes() -> dict[str, Compared]:
    return run_ranks(every_mode, 1)[0]


@pytest.mark.parametrize("name", [*MODES, *(f"k' = {k}" for k in EVALUATED)])
def test_two_dense_products_equal_a_loop_over_tokens_and_experts(modes, name):
    found = modes[name]
    assert found.layer.keys() == found.loop.keys() > {"x", "router.weight", "lora.linear_fc1.a", "lora.linear_fc2.b"}
    for part, value in found.layer.items():
        assert torch.allclose(value, found.loop[part], rtol=1e-4, atol=1e-5), part
        assert value.abs().max() > 1e-3 or part.startswith("router")
    if name.startswith("k'"):
        assert found.counts == {int(name.rpartition(" ")[2])}


def at_the_start(changes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output of the core's MLP with the same weights, of a new LoraMLP, and of one whose B are not zero."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    start()
    mlp = build(**changes)
    config = layer_config(stock=True, num_moe_experts=None, moe_ffn_hidden_size=None, **changes)
    spec = get_gpt_layer_local_spec().submodules.mlp
    core = spec(config=config, pg_collection=get_default_pg_collection(), is_mtp_layer=False)
    core.load_state_dict({n: v for n, v in mlp.state_dict().items() if n.startswith("linear_")})
    hidden = hidden_states().to(config.params_dtype)
    other = mlp(hidden)[0]
    mlp.lora.linear_fc1.b.data.zero_()
    mlp.lora.linear_fc2.b.data.zero_()
    return core(hidden)[0].detach(), mlp(hidden)[0].detach(), other.detach()


@pytest.mark.parametrize("changes", [{}, {"bf16": True, "params_dtype": torch.bfloat16}], ids=["fp32", "bf16"])
def test_a_new_layer_is_the_core_s_mlp_bit_by_bit(changes):
    core, new, other = run_ranks(at_the_start, 1, changes)[0]
    assert torch.equal(core, new) and not torch.allclose(core, other, atol=1e-2)


SHARDED = {"linear_fc1.weight": 0, "linear_fc2.weight": 1, "lora.linear_fc1.b": 0, "lora.linear_fc2.a": 1}


def on_ranks(ranks: int, sequence_parallel: bool, losses: dict[str, Any]) -> dict[str, Tensor]:
    """Output for this rank's tokens, and the gradients as Megatron-Core finishes them, of one layer on `ranks`."""
    from megatron.core import parallel_state

    start(tensor_model_parallel_size=ranks)
    parallel = {"tensor_model_parallel_size": ranks, "sequence_parallel": sequence_parallel}
    mlp = build(**losses, **parallel)
    rank, group = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_group()
    started = mlp.lora.linear_fc2.a.detach().clone()
    for name, weight in mlp.named_parameters():
        weight.data.copy_(share_of(name, whole(mlp, name, ranks), rank, ranks))
    hidden = hidden_states().detach()
    local = hidden.chunk(ranks)[rank] if sequence_parallel else hidden
    local.requires_grad_()
    output, _ = mlp(local)
    output.backward(torch.ones_like(output) + output.detach().sin())
    found = {"output": output.detach(), "x": local.grad, "start": started}
    for name, weight in mlp.named_parameters():
        if name.startswith(("lora", "router")):
            if sequence_parallel and getattr(weight, "sequence_parallel", False):
                torch.distributed.all_reduce(weight.grad, group=group)
            found[name] = weight.grad
    return found


def whole(mlp: Any, name: str, ranks: int) -> Tensor:
    """A whole weight that follows from its name, whatever this rank holds of it."""
    shape = list(mlp.get_parameter(name).shape)
    if name in SHARDED:
        shape[SHARDED[name]] *= ranks
    generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
    return torch.randn(shape, generator=generator) / 4


def share_of(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What a tensor rank holds of a whole weight; of the first layer's outputs its part of the gate and of up."""
    if name not in SHARDED:
        return tensor
    if SHARDED[name] == 0:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(ranks, dim=1)[rank]


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sequence-parallel", "not"])
def test_two_tensor_ranks_equal_one(sequence_parallel):
    losses = AUX if sequence_parallel else {}  # the core has load balancing over tensor ranks with it alone
    (one,) = run_ranks(on_ranks, 1, 1, False, losses)
    both = run_ranks(on_ranks, 2, 2, sequence_parallel, losses)
    for name, value in one.items():
        for rank, found in enumerate(both):
            mine = value.chunk(2)[rank] if sequence_parallel and name in ("output", "x") else value
            mine = mine.chunk(2, dim=1)[rank] if name == "start" else share_of(name, mine, rank, 2)
            assert torch.allclose(found[name], mine, rtol=1e-4, atol=1e-5), (name, rank)
