"""FLOPs of a whole model against those that torch counts in transformers' own forward pass of the same model."""

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_emoe.hf.active_experts import set_active_experts
from megatron_emoe.hf.registry import architecture_of
from megatron_emoe.model.flops import flops_per_token, moe_layer_numbers
from tests import hf_models
from tests.hf_models import MODEL_TYPES

DEFAULTS = {
    "moe_layer_freq": 1,
    "multi_latent_attention": False,
    "q_lora_rank": None,
    "group_query_attention": False,
    "num_query_groups": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_shared_expert_gate": False,
    "emoe_null_experts": None,
    "emoe_lora_experts": None,
}
BY_HAND = {
    **DEFAULTS,
    "num_layers": 2,
    "hidden_size": 4,
    "num_attention_heads": 2,
    "kv_channels": 2,
    "ffn_hidden_size": 8,
    "moe_ffn_hidden_size": 3,
    "num_experts": 5,
    "padded_vocab_size": 7,
    "seq_length": 9,
    "swiglu": False,
}


def args_of(config, seq_length: int) -> Namespace:
    """What Megatron's completed arguments say of a transformers model."""
    flags = architecture_of(config).flags(config)
    frequency = flags.get("moe_layer_freq")
    flags["moe_layer_freq"] = eval(frequency) if frequency else 1
    flags.setdefault("kv_channels", config.hidden_size // config.num_attention_heads)
    return Namespace(**DEFAULTS | flags | {"padded_vocab_size": config.vocab_size, "seq_length": seq_length})


def counted(model, length: int) -> int:
    """FLOPs of matrix products in a forward pass, without those of rotary embedding's angles."""
    model.config._experts_implementation = "eager"  # grouped products are not all counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(hf_models.tokens(batch=1, length=length), use_cache=False)
    total = counter.get_flop_counts()
    angles = [sum(flops.values()) for name, flops in total.items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("ks", [(2, 2), (1, 6)])
def test_as_many_as_torch_counts(model_type, ks):
    model = hf_models.build(model_type, num_key_value_heads=4 if model_type == "deepseek_v2" else 2)
    set_active_experts(model, ks)
    # One token alone has a context of one. Of several, torch counts the products with masked tokens too: the whole
    # square where (S + 1) / 2 are needed, which is what is added here.
    assert flops_per_token(args_of(model.config, 1), ks) == counted(model, 1)
    one, nine = (flops_per_token(args_of(model.config, length), ks) for length in (1, 9))
    attention = (nine - one) / 4  # for each token of context, of which nine have four more on average
    assert counted(model, 9) == 9 * (one + 8 * attention)


def test_by_hand():
    # Projections 4 x (4 + 4 + 4) and 4 x 4: 64; router 4 x 5; an expert 2 x 4 x 3: 24; head 4 x 7.
    # Attention: scores and values, 2 heads x 2, over (9 + 1) / 2 tokens: 2 x 4 x 5 = 40.
    per_layer = 64 + 20 + 40
    assert flops_per_token(Namespace(**BY_HAND), [1, 3]) == 2 * (2 * per_layer + 4 * 24 + 28)
    # The first layer dense: 2 x 4 x 8 instead of router and experts. Gated: three matrices instead of two.
    dense = Namespace(**BY_HAND | {"moe_layer_freq": [0, 1], "swiglu": True})
    assert flops_per_token(dense, [3]) == 2 * (2 * (64 + 40) + 20 + 3 * 36 + 96 + 28)
    # Three null experts: a router of 4 x 8.
    null = Namespace(**BY_HAND | {"emoe_null_experts": 3})
    assert flops_per_token(null, [1, 3]) == 2 * (2 * (64 + 32 + 40) + 4 * 24 + 28)


@pytest.mark.parametrize(("frequency", "numbers"), [(1, [1, 2, 3, 4, 5]), (2, [1, 3, 5]), ([0, 1, 1, 0, 1], [2, 3, 5])])
def test_numbers_of_moe_layers(frequency, numbers):
    assert moe_layer_numbers(Namespace(moe_layer_freq=frequency, num_layers=5)) == numbers


def test_what_is_not_counted_has_no_number():
    assert flops_per_token(Namespace(**BY_HAND, moe_latent_size=2), [1, 1]) is None
