"""The memory model against checkpoints on disk, against what autograd really keeps, and against hand arithmetic."""

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_emoe.plan.layout import Layout
from megatron_emoe.plan.memory import (
    GIB,
    kept_by_attention,
    kept_by_experts,
    kept_per_row,
    largest_sum,
    stage_memory,
)
from megatron_emoe.plan.parameters import stage_parameters
from tests.distributed import run_ranks
from tests.tiny import begin, build_layer, flags, layer_config, start, train

SEEN = {
    "num_layers": 2,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "moe_ffn_hidden_size": 128,
    "vocab_size": 1024,
    "moe_router_dtype": "fp32",
    "bf16": True,
    "use_distributed_optimizer": True,
    "train_iters": 1,
}


def trained(words: list[str]) -> Any:
    from megatron.training import get_args

    train(words)
    return get_args()


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parallel"), [(2, {"expert_model_parallel_size": 2}), (2, {}), (1, {})])
def test_weights_and_optimizer_are_the_bytes_of_a_checkpoint(ranks, parallel, tmp_path):
    """bf16 weights once, and on every rank its share of fp32 weights and moments: 2 + 12 bytes a parameter."""
    args = run_ranks(trained, ranks, flags(**SEEN | parallel | {"save": tmp_path, "save_interval": 1}))[0]
    ep = args.expert_model_parallel_size
    layout = Layout(ranks, 8, 1, 1, ep, 1, args.micro_batch_size, args.global_batch_size, args.seq_length)
    rank = planned(args, layout)
    weights = stage_parameters(args, replace(layout, ep=1), 0).total * 2
    written = sum(file.stat().st_size for file in Path(tmp_path).rglob("*.distcp"))
    # Names and sizes of every tensor come on top, and shares are padded to 128 elements.
    assert written == pytest.approx(weights + ranks * rank.optimizer, rel=0.03)
    copies = ranks - 1  # of what is not spread over expert-parallel ranks
    shared = stage_parameters(args, layout, 0).dense if ep > 1 else stage_parameters(args, layout, 0).total
    assert rank.weights * ranks == weights + copies * 2 * shared


def planned(args: Any, layout: Layout) -> Any:
    """Memory of a rank of the only stage, for arguments of a run with a constant k."""
    from megatron_emoe.settings.elastic_config import ElasticConfig

    config = ElasticConfig()
    k = args.moe_router_topk
    model = SimpleNamespace(
        args=args, config=config, moe_layers=[1, 2], passes=1, expected_k=k, largest_k=k, k_distribution={k: 1.0}
    )
    return stage_memory(model, layout, 0, 1.0)


HIDDEN, WIDTH, TOKENS = 64, 96, 256


def kept(k: int, shared: int | None, gate: bool, tp: int = 1) -> int:
    """Bytes that autograd keeps of one MoE layer's forward pass, parameters and the layer's input left out.

    tp: ranks that share the tokens and every expert.

    bf16 with a balancing loss and the fused gated activation, as a GPU run has them.
    """
    import torch

    start(tensor_model_parallel_size=tp, expert_tensor_parallel_size=tp)
    split = {"tensor_model_parallel_size": tp, "expert_tensor_parallel_size": tp, "sequence_parallel": tp > 1}
    widths = {"hidden_size": HIDDEN, "ffn_hidden_size": WIDTH, "moe_ffn_hidden_size": WIDTH}
    numbers = {"params_dtype": torch.bfloat16, "bf16": True, "moe_router_dtype": "fp32", "moe_router_topk": k}
    experts = {"moe_shared_expert_intermediate_size": shared, "moe_shared_expert_gate": gate}
    balance = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
    layer = build_layer(layer_config(**widths, **numbers, **experts, **balance, **split, bias_activation_fusion=True))
    x = torch.randn(TOKENS // 2 // tp, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    outside = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    storages: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storages[tensor.untyped_storage().data_ptr()] = tensor  # which stays, so that no other gets its address
        return tensor

    begin()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in outside)


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "gate"), [(None, False), (128, False), (128, True)])
def test_what_experts_keep_is_what_autograd_keeps(shared, gate):
    args = SimpleNamespace(
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=WIDTH,
        num_experts=8,
        swiglu=True,
        moe_shared_expert_intermediate_size=shared,
        moe_shared_expert_gate=gate,
    )
    for k in (1, 2, 5):
        assert run_ranks(kept, 1, k, shared, gate)[0] == pytest.approx(TOKENS * kept_by_experts(args, k), rel=0.01)
    if shared is None:
        planned = TOKENS // 2 * kept_by_experts(args, 5, etp=2)
        assert run_ranks(kept, 2, 5, shared, gate, 2)[0] == pytest.approx(planned, rel=0.01)


def test_larger_draws_by_brute_force():
    probabilities = {2: 0.5, 3: 0.3, 7: 0.2}
    sums: dict[int, float] = {}
    for ks in product(probabilities, repeat=4):
        chance = 1.0
        for k in ks:
            chance *= probabilities[k]
        sums[sum(ks)] = sums.get(sum(ks), 0.0) + chance
    assert largest_sum(probabilities, 4, each_its_own=True) == max(sums) == 28  # 0.2 ** 4 is no rare event
    assert largest_sum(probabilities, 4, each_its_own=False) == 28
    # 40 layers at 2 or 4 by a fair coin: the largest sum has probability 2 ** -40; 36 heads or more 9.3e-8 all
    # together, 35 or more 6.9e-7, 34 or more 4.2e-6: 34 is the first that more than one step in a million reaches.
    assert largest_sum({2: 0.5, 4: 0.5}, 40, each_its_own=True) == 40 * 2 + 34 * 2


BY_HAND = SimpleNamespace(
    num_layers=4,
    moe_layer_freq=1,
    hidden_size=10,
    num_attention_heads=2,
    kv_channels=5,
    group_query_attention=False,
    num_query_groups=None,
    multi_latent_attention=False,
    qk_layernorm=False,
    add_bias_linear=False,
    add_qkv_bias=False,
    normalization="RMSNorm",
    swiglu=True,
    num_experts=4,
    moe_router_topk=1,
    moe_ffn_hidden_size=6,
    moe_shared_expert_intermediate_size=None,
    moe_shared_expert_gate=False,
    emoe_selection="prefix",
    emoe_null_experts=None,
    emoe_budget_scales=False,
    emoe_teacher=None,
    emoe_lora_experts=None,
    vocab_size=100,
    make_vocab_size_divisible_by=128,
    untie_embeddings_and_output_weights=True,
    position_embedding_type="rope",
    max_position_embeddings=64,
    padded_vocab_size=None,
)


def model_by_hand(draw: str, passes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        args=BY_HAND,
        config=SimpleNamespace(emoe_k_draw=draw),
        passes=passes,
        moe_layers=[1, 2, 3, 4],
        expected_k=1.5,
        largest_k=2,
        k_distribution={1: 0.5, 2: 0.5},
    )


def test_by_hand():
    layout = Layout(8, 8, 1, 2, 2, 1, 1, 16, 64)
    memory = stage_memory(model_by_hand("step"), layout, 1, 1.5)
    # The last stage: two layers of 10 x 30 + 10 x 10 weights, two norms, a router of 4 x 10, and two of four experts of
    # 3 x 10 x 6; the last norm, and a head of 128 rows.
    dense, expert = 2 * (400 + 20 + 40) + 10 + 1280, 2 * 2 * 180
    assert memory.weights == 2 * (dense + expert) and memory.gradients == 4 * (dense + expert)
    assert memory.optimizer == 12 * (dense / 4 + expert / 2)  # 4 data-parallel ranks, 2 copies of an expert
    row = 2 * 10 + 6 * 6 + 28
    attention = 4 * 10 + 4 * 2 + 2 * (30 + 20 + 10)
    assert kept_per_row(BY_HAND) == row and kept_by_attention(BY_HAND) == attention
    layer = attention + 4 * 10 + 4 * 16 + 1.5 * 1.5 * row  # k times the imbalance
    assert memory.activations == 64 * (2 * layer + 4 * 10)
    assert memory.larger_k == 64 * 1.5 * row * 2 * 0.5  # both layers at 2 instead of 1.5
    assert memory.all_to_all == 64 * 2 * 20 * 2.5 and memory.working == 0
    assert memory.logits == 64 * 128 * 6
    assert memory.total == sum(memory.parts().values())


def test_a_second_pass_is_kept_beside_the_first():
    layout = Layout(8, 8, 1, 1, 2, 1, 1, 16, 64)
    one, both = (stage_memory(model_by_hand("step", passes), layout, 0, 1.0) for passes in (1, 2))
    assert both.activations == 2 * one.activations and both.logits == 2 * one.logits
    assert (both.weights, both.optimizer, both.all_to_all) == (one.weights, one.optimizer, one.all_to_all)
    # The first pass is at k = 1 and the second at most at 2, as E[k] = 1.5 has them already.
    assert (one.larger_k > 0, both.larger_k) == (True, 0)


def test_a_teacher_is_its_weights_in_bf16_and_its_logits(monkeypatch):
    layout = Layout(8, 8, 1, 1, 2, 1, 1, 16, 64)
    alone = stage_memory(model_by_hand("step"), layout, 0, 1.0)
    monkeypatch.setattr(BY_HAND, "emoe_teacher", "base")
    taught = stage_memory(model_by_hand("step"), layout, 0, 1.0)
    assert alone.teacher == 0 and taught.teacher == alone.weights + 64 * 128 * 6
    assert taught.total - alone.total == taught.teacher


def test_the_first_stage_keeps_more_micro_batches_and_recomputation_less():
    layout = Layout(8, 8, 1, 2, 2, 1, 1, 16, 64)
    model = model_by_hand("layer")
    first, last = (stage_memory(model, layout, stage, 1.0) for stage in (0, 1))
    assert first.activations == 2 * (last.activations - 64 * 40) and first.logits == 0
    experts, full = (stage_memory(model, replace(layout, recompute=kind), 0, 1.0) for kind in ("moe", "full"))
    assert full.activations == 2 * 2 * 64 * 20 < experts.activations < first.activations
    assert experts.larger_k == full.larger_k == 0 and full.working > experts.working > 0
    fp8 = stage_memory(model, replace(layout, fp8=True), 0, 1.0)
    assert fp8.weights - first.weights == 2 * 2 * (400 + 360)  # of linear layers alone
    lean = stage_memory(model, replace(layout, state="fp8"), 0, 1.0)
    assert first.gradients / lean.gradients == 4 / 2 and first.optimizer / lean.optimizer == 12 / 4
    assert GIB == 2**30
