"""k' in a loop of one's own: every layer follows it and falls back after it; what cannot be is refused at once."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from megatron_emoe.routing.active_experts import active_experts, begin_microbatch
from tests.distributed import run_ranks
from tests.tiny import PREFIX, build_layer, hidden_states, layer_config, start

TOKENS = 16  # of hidden_states()


def model(**changes: Any) -> nn.ModuleList:
    """Layers 1 and 3 of a model of four, in evaluation mode."""
    config = layer_config(num_layers=4, **changes)
    return nn.ModuleList([build_layer(config, layer_number=number) for number in (1, 3)]).eval()


def used(layers: nn.ModuleList) -> list[int]:
    """Experts of a token in each layer: rows that reach the experts, by token."""
    rows: list[float] = []
    for layer in layers:
        hook = layer.experts.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0].shape[0] / TOKENS))
        with torch.no_grad():
            layer(hidden_states())
        hook.remove()
    return rows


def at_several_k() -> dict[str, list[int]]:
    start()
    layers, seen = model(), {}
    with active_experts(layers, 5):
        seen["one number"] = used(layers)
        with active_experts(layers, (1, 8)):
            seen["inside, by layer"] = used(layers)
        seen["after that"] = used(layers)
    seen["at the end"] = used(layers)
    with active_experts([layers[:1], layers[1:]], 3):
        seen["chunks"] = used(layers)
    return seen


def test_layers_follow_and_fall_back():
    assert run_ranks(at_several_k, 1)[0] == {
        "one number": [5, 5],
        "inside, by layer": [1, 8],
        "after that": [5, 5],
        "at the end": [2, 2],
        "chunks": [3, 3],
    }


def outputs_with_tails() -> dict[Any, torch.Tensor]:
    start()
    layer, outputs = model(emoe_tail_scale=["0.5"])[0], {}
    for weight in layer.experts.parameters():
        weight.data *= 30  # from initial values, whose product is smaller than the tolerance of a comparison
    for k, tail in ((2, None), (4, None), (4, 0.5), (4, 0.0), (4, 1.0)):
        with torch.no_grad(), active_experts(layer, k, tail_scale=tail):
            outputs[k, tail] = layer(hidden_states())[0]
    with torch.no_grad(), active_experts(layer, 4):
        outputs["again"] = layer(hidden_states())[0]
    with torch.no_grad(), active_experts(layer, 4, tail_scale={3: 0.75, 5: 0.25}):
        outputs["between"] = layer(hidden_states())[0]
    return outputs


def test_a_tail_scale_that_is_given_wins_over_the_model_s_own():
    outputs = run_ranks(outputs_with_tails, 1)[0]
    assert torch.equal(outputs[4, None], outputs[4, 0.5]) and torch.equal(outputs["again"], outputs[4, None])
    assert torch.equal(outputs["between"], outputs[4, 0.5])
    torch.testing.assert_close(outputs[4, 0.0], outputs[2, None])  # experts that weigh nothing: plain top-k
    # Not renormalised, the output is linear in the scale: at 1/2 it lies half way between 0 and 1.
    torch.testing.assert_close(outputs[4, 0.5], (outputs[4, 0.0] + outputs[4, 1.0]) / 2)
    assert (outputs[4, 1.0] - outputs[4, 0.0]).abs().max() > 1e-3


def refusals() -> list[str]:
    start()
    layers = model()
    training = model().train()
    grouped = model(moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk=2)
    messages = []
    for asked, k in ((layers, 9), (layers, 0), (layers, [2, 9]), (layers, [2]), (grouped, 5), (training, 2)):
        with pytest.raises(ValueError) as error, active_experts(asked, k):
            pass
        messages.append(str(error.value))
    with pytest.raises(ValueError) as error, active_experts(nn.Linear(1, 1), 1):
        pass
    return [*messages, str(error.value)]


def test_what_cannot_be_is_refused():
    expected = [
        "k' 9: must lie in [1, 8], the number of experts",
        "k' 0: must lie in [1, 8], the number of experts",
        "k' 9: must lie in [1, 8], the number of experts",
        "k' [2]: has 1 entries; must have one for each of the 2 MoE layers",
        "k' 5: ",
        "the model is in training mode, where k is the schedule's: call its eval() first",
        "the model has no elastic layer: build it with the spec that elastic_spec() returns",
    ]
    for message, start_of_it in zip(run_ranks(refusals, 1)[0], expected, strict=True):
        assert re.match(re.escape(start_of_it), message), message


def drawn() -> list[list[int]]:
    start()
    layers = model(**PREFIX, emoe_k_draw="microbatch").train()
    with pytest.raises(RuntimeError, match="begin_microbatch"):
        layers[0](hidden_states())
    found = []
    for place in ((0, 0), (0, 1), (1, 0), (0, 1)):
        begin_microbatch(*place)
        found.append(used(layers))
    return found


def test_draws_follow_the_place():
    first, second, third, again = run_ranks(drawn, 1)[0]
    assert second == again and all(pair[0] == pair[1] and 1 <= pair[0] <= 4 for pair in (first, second, third))
    assert len({first[0], second[0], third[0]}) > 1
