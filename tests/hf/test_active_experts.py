"""k' and tail scale of a transformers model that is already loaded, on tiny models of every architecture."""

import math
import re

import pytest
import torch
from torch import Tensor

from megatron_emoe.hf.active_experts import counting_rows, moe_layer_numbers, set_active_experts
from megatron_emoe.hf.comparison import gate_of
from tests import hf_models
from tests.hf_models import LATER_TYPES, MODEL_TYPES

MOE_TYPES = [*MODEL_TYPES, *(name for name in LATER_TYPES if name != "llama")]
TOKENS = 2 * 24  # of hf_models.tokens()
FIRST_DENSE = ("deepseek_v2", "ernie4_5_moe", "deepseek_v3")
SCORES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(hf_models.tokens(), use_cache=False).logits


def rows(model) -> dict[int, int]:
    with counting_rows(model) as counted:
        logits(model)
    return counted


def give_scores(model_type: str, gate) -> None:
    """The hidden state (1, 0, ...) has these scores then, and no selection bias."""
    sigmoid = model_type == "deepseek_v3"
    gate.weight.zero_()
    gate.weight[:, 0] = SCORES.logit() if sigmoid else SCORES.log()
    if sigmoid:
        gate.e_score_correction_bias.zero_()
    if model_type == "ernie4_5_moe":
        gate.moe_statics.e_score_correction_bias.zero_()


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_rows_follow_k(model_type):
    model = hf_models.build(model_type)
    first, second = moe_layer_numbers(model.config)
    assert (first, second) == ((2, 3) if model_type in FIRST_DENSE else (1, 2))  # dense layers count
    assert rows(model) == {first: 2 * TOKENS, second: 2 * TOKENS}  # the model's own k
    for k in (1, 8, [3, 5], (8, 1)):
        set_active_experts(model, k)
        ks = [k, k] if isinstance(k, int) else k
        assert rows(model) == {first: ks[0] * TOKENS, second: ks[1] * TOKENS}
    assert model.config.num_experts_per_tok == 2


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_a_model_told_k_is_the_model_built_with_that_k(model_type):
    told = hf_models.build(model_type)
    set_active_experts(told, 5)
    built = hf_models.build(model_type, num_experts_per_tok=5)
    assert torch.equal(logits(told), logits(built))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_tail_scale(model_type):
    model = hf_models.build(model_type)
    at_k = logits(model)
    set_active_experts(model, 6)
    plain = logits(model)
    assert (plain - at_k).abs().max() > 1e-2
    set_active_experts(model, 6, {0: 1.0})
    assert torch.equal(logits(model), plain)
    set_active_experts(model, 6, {0: 0.0})
    torch.testing.assert_close(logits(model), at_k, rtol=0, atol=1e-5)  # the tail weighs nothing: plain top-k
    set_active_experts(model, 6, {4: 0.2, 8: 0.6})
    between = logits(model)
    set_active_experts(model, 6, {0: 0.4})  # half way between 4 and 8
    assert torch.equal(logits(model), between)
    assert all((between - other).abs().max() > 1e-3 for other in (plain, at_k))
    set_active_experts(model, 2, {0: 0.4})  # at k there is no tail
    assert torch.equal(logits(model), at_k)


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_weights_with_a_tail_scale_by_hand(model_type):
    model = hf_models.build(model_type, num_experts=4)
    set_active_experts(model, 3, {3: 0.25})
    gate = gate_of(model.model.layers[-1])
    with torch.no_grad():
        give_scores(model_type, gate)
        if model_type == "ernie4_5_moe":
            gate.moe_statics.e_score_correction_bias[0, 0] = 0.5  # ranks: 0, 1, 3
        if model_type == "deepseek_v3":
            gate.e_score_correction_bias[0] = 0.5
        _, weights, chosen = gate(torch.eye(1, 32))
    found = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    raw = {1: 0.4, 3: 0.3, 2: 0.05}  # the third best has 0.2 / 4; not renormalised
    biased = {0: 0.1 / 0.575, 1: 0.4 / 0.575, 3: 0.075 / 0.575}  # 0.3 / 4, then sum 1
    expected = {
        "ernie4_5_moe": biased,
        "deepseek_v3": {expert: 2.446 * weight for expert, weight in biased.items()},
        "qwen3_moe": {expert: weight / 0.75 for expert, weight in raw.items()},
        "mixtral": {expert: weight / 0.75 for expert, weight in raw.items()},
        "granitemoe": {expert: weight / 0.75 for expert, weight in raw.items()},
    }.get(model_type, raw)
    assert found == pytest.approx(expected)


def test_a_renormalising_gate_scales_first():
    model = hf_models.build("qwen2_moe", num_experts=4, norm_topk_prob=True)
    set_active_experts(model, 3, {0: 0.25})
    gate = model.model.layers[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
        _, weights, _ = gate(torch.eye(1, 32))
    assert weights[0].tolist() == pytest.approx([0.4 / 0.75, 0.3 / 0.75, 0.05 / 0.75])


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "k' 0: must lie in [1, 8], the number of experts"),
        ([2, 9], "k' 9: must lie in [1, 8], the number of experts"),
        ([2, 2, 2], "k' [2, 2, 2]: has 3 entries; must have one for each of the 2 MoE layers"),
    ],
)
def test_a_k_that_cannot_be_is_refused_and_changes_nothing(k, message):
    model = hf_models.build("olmoe")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        set_active_experts(model, k)
    assert [layer.mlp.gate.top_k for layer in model.model.layers] == [2, 2]


def test_the_tail_begins_at_the_k_of_training():
    """A model that was exported to run at another k says so in its config."""
    model = hf_models.build("olmoe", num_experts_per_tok=4)
    model.config.emoe = {"k_train": 2}
    set_active_experts(model, 2)
    at_two = logits(model)
    set_active_experts(model, 4, {0: 0.0})
    torch.testing.assert_close(logits(model), at_two, rtol=0, atol=1e-5)


def test_groups_limit_k():
    model = hf_models.build("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    set_active_experts(model, 4)
    with pytest.raises(ValueError, match="^k' 5: the 2 groups of a token hold only 4 experts$"):
        set_active_experts(model, 5)


def test_a_dense_model_has_no_k():
    with pytest.raises(ValueError, match="^model_type 'llama': has no experts, and so no k'$"):
        set_active_experts(hf_models.build("llama"), 2)


def test_another_architecture_is_refused():
    model = hf_models.build("olmoe")
    model.config.model_type = "phimoe"
    with pytest.raises(ValueError, match="^model_type 'phimoe' is not supported; supported: olmoe, "):
        set_active_experts(model, 2)


@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_weights_with_learned_scales_by_hand(model_type):
    model = hf_models.build(model_type, num_experts=4)
    rows = [[0.0, 0.0], [math.log(2), 0.0, math.log(4)]]
    model.config.emoe = {"k_train": 2, "budget_scales": {"k": [2, 3], "log": [[[0.5] * 2, [0.5] * 3], rows]}}
    set_active_experts(model, 3, {3: 0.25})
    gate = gate_of(model.model.layers[-1])
    with torch.no_grad():
        give_scores(model_type, gate)
        _, weights, chosen = gate(torch.eye(1, 32))
        set_active_experts(model, 2)
        _, at_k, _ = gate(torch.eye(1, 32))
    found = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    expected = {1: 0.8, 3: 0.3, 2: 0.2}  # twice the best, 0.2 / 4 x 4: the tail scale beside the learned one
    factor = 2.446 if model_type == "deepseek_v3" else 1
    renormalises = model_type in ("ernie4_5_moe", "qwen3_moe", "mixtral", "deepseek_v3", "granitemoe")
    total = sum(expected.values()) if renormalises else 1
    assert found == pytest.approx({expert: factor * weight / total for expert, weight in expected.items()})
    total = 0.7 if renormalises else 1
    assert sorted(at_k[0].tolist()) == pytest.approx([factor * 0.3 / total, factor * 0.4 / total])  # scales of 1 there


@pytest.mark.parametrize(
    ("block", "rule"),
    [
        ([1], "emoe [1]: must be an object"),
        ({"k_train": "2"}, "emoe.k_train '2': must be a whole number in [1, 8]"),
        ({"tail_scale": 0.5}, "emoe.tail_scale 0.5: must be a list of words"),
        ({"budget_scales": {"k": [2], "log": [[[0, 1000]]] * 2}}, "emoe.budget_scales.log: 1000; must be a number in"),
    ],
)
def test_a_block_that_is_wrong_is_refused_and_changes_nothing(block, rule):
    model = hf_models.build("olmoe")
    model.config.emoe = block
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}"):
        set_active_experts(model, 4)
    assert {layer.mlp.gate.top_k for layer in model.model.layers} == {2}
