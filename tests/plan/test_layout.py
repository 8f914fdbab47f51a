"""Layouts: how layers are split, what is refused and why, and flags that Megatron itself takes."""

import shlex
from argparse import Namespace
from dataclasses import replace

import pytest

from megatron_emoe.plan.layout import Layout, broken_rules, layout_flags, layout_of, megatron_rules, stage_layers
from tests.distributed import run_ranks

MODEL = Namespace(
    num_layers=28,
    num_attention_heads=20,
    group_query_attention=True,
    num_query_groups=4,
    ffn_hidden_size=12288,
    moe_ffn_hidden_size=1536,
    moe_shared_expert_intermediate_size=3072,
    num_experts=60,
    hidden_size=2560,
    max_position_embeddings=8192,
    kv_channels=128,
    multi_latent_attention=False,
    moe_layer_freq=[0] + [1] * 27,
    padded_vocab_size=None,
    sequence_parallel=False,
    emoe_second_pass=0.0,
    emoe_teacher=None,
    emoe_lora_experts=None,
)
GOOD = Layout(gpus=16, gpus_per_node=8, tp=2, pp=2, ep=4, etp=1, micro_batch=1, global_batch=256, seq=4096)


def test_sizes_of_groups():
    assert (GOOD.dp, GOOD.edp, GOOD.micro_batches, GOOD.tokens) == (4, 2, 64, 2048)
    assert GOOD.crosses_nodes(9) and not GOOD.crosses_nodes(8)


@pytest.mark.parametrize(
    ("layers", "pp", "sizes"),
    [(28, 1, [28]), (28, 4, [7] * 4), (27, 2, [13, 14]), (27, 4, [6, 7, 7, 7]), (3, 2, [1, 2]), (28, 8, [7] + [3] * 7)],
)
def test_layers_of_stages(layers, pp, sizes):
    stages = stage_layers(layers, pp)
    assert [len(stage) for stage in stages] == sizes
    assert [number for stage in stages for number in stage] == list(range(1, layers + 1))


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match="--pp 5: more stages than the model's 4 layers"):
        stage_layers(4, 5)


def test_a_possible_layout_breaks_no_rule():
    assert list(broken_rules(MODEL, GOOD)) == list(broken_rules(MODEL, replace(GOOD, fp8=True))) == []


def test_a_teacher_needs_one_stage():
    args = Namespace(**vars(MODEL) | {"emoe_teacher": "base"})
    assert "--pp 2: must be 1 with --emoe-teacher base, both passes go through the whole model" in list(
        megatron_rules(args, GOOD)
    )


def test_a_second_pass_needs_one_stage():
    args = Namespace(**vars(MODEL) | {"emoe_second_pass": 0.5})
    assert list(broken_rules(args, GOOD)) == [
        "--pp 2: must be 1 with --emoe-second-pass 0.5, both passes go through the whole model"
    ]
    assert list(broken_rules(args, replace(GOOD, pp=1))) == []


BROKEN = [
    ({"tp": 8}, "--tp 8: must divide the model's 20 attention heads (--num-attention-heads)"),
    ({"tp": 8}, "--tp 8: must divide the model's 4 groups of keys and values (--num-query-groups)"),
    ({"tp": 3}, "--tp 3 x --pp 2 = 6: must divide --gpus 16"),
    ({"ep": 8}, "--ep 8: must divide the model's 60 experts (--num-experts)"),
    ({"ep": 12}, "--ep 12 x --etp 1 x --pp 2 = 24: must divide --gpus 16"),
    ({"etp": 5}, "--etp 5: must divide the model's 1536 columns (--moe-ffn-hidden-size)"),
    ({"pp": 32}, "--pp 32: more stages than the model's 28 layers (--num-layers)"),
    ({"seq": 16384}, "--seq 16384: must not exceed the model's --max-position-embeddings 8192"),
    ({"seq": 4095}, "--tp 2: must divide --seq 4095, which its ranks share (--sequence-parallel)"),
    ({"global_batch": 6}, "--global-batch 6: must be a multiple of --micro-batch 1 x 4 data-parallel ranks"),
    (
        {"fp8": True, "tp": 4, "seq": 4},
        "--precision fp8: --micro-batch 1 x --seq 4 / --tp 4 = 1 must be a multiple of 16",
    ),
    ({"fp8": True, "etp": 128}, "--precision fp8: --moe-ffn-hidden-size / --etp 128 = 12 must be a multiple of 16"),
    ({"fp8": True, "tp": 128}, "--precision fp8: queries' width / --tp 128 = 20 must be a multiple of 16"),
    (
        {"fp8": True, "tp": 128},
        "--precision fp8: --moe-shared-expert-intermediate-size / --tp 128 = 24 must be a multiple of 16",
    ),
    ({"gpus": 12}, "--gpus 12: must be a multiple of --gpus-per-node 8, or fit on one node"),
]


@pytest.mark.parametrize(("change", "rule"), BROKEN, ids=[rule for _, rule in BROKEN])
def test_impossible_layouts_are_named_by_rule(change, rule):
    assert rule in list(broken_rules(MODEL, replace(GOOD, **change)))


def test_what_a_plan_refuses_and_megatron_takes():
    """More ranks than groups of keys and values, and a dense layer's odd width where no layer is dense."""
    model = Namespace(**vars(MODEL) | {"moe_layer_freq": 1, "ffn_hidden_size": 66, "num_query_groups": 2})
    layout = replace(GOOD, tp=4)
    assert list(megatron_rules(model, layout)) == []
    assert list(broken_rules(model, layout)) == [
        "--tp 4: must divide the model's 2 groups of keys and values (--num-query-groups)"
    ]
    dense = Namespace(**vars(model) | {"moe_layer_freq": 2, "num_query_groups": 3})
    assert [rule.partition(": ")[2] for rule in megatron_rules(dense, layout)] == [
        "must divide the model's 66 columns of a dense layer (--ffn-hidden-size)",
        "must divide the model's 3 groups of keys and values (--num-query-groups), or be a multiple of them",
    ]


def completed_by_megatron(name: str, layout: Layout) -> Namespace:
    """What Megatron's own parser makes of the flags, with the world that they are for."""
    from megatron_emoe.plan.model import read_model
    from megatron_emoe.settings import flag_files
    from megatron_emoe.training import arguments

    model = read_model(name, None, None)
    words = flag_files.expand([*model.words, *shlex.split(shlex.join(layout_flags(model.args, layout)))])
    return arguments.completed(arguments.parsed(words), layout.gpus)


def test_megatron_takes_the_flags_and_means_the_same():
    layout = replace(GOOD, gpus=32, tp=2, pp=4, ep=4, recompute="moe")
    args = run_ranks(completed_by_megatron, 1, "deepseek-v2-lite-16b", layout)[0]
    assert layout_of(args, layout.gpus_per_node) == layout and args.data_parallel_size == layout.dp == 4
    assert args.decoder_first_pipeline_num_layers == 6 and args.recompute_modules == ["moe"]
    assert args.use_distributed_optimizer and args.moe_token_dispatcher_type == "alltoall" and args.sequence_parallel
    layout = replace(GOOD, gpus=8, tp=1, pp=1, ep=4, etp=2, recompute="full")
    args = run_ranks(completed_by_megatron, 1, "olmoe-7b", layout)[0]
    assert layout_of(args, layout.gpus_per_node) == layout and layout.name() == "TP1 PP1 EP4 ETP2 DP8"
    assert args.recompute_num_layers == 1 and not args.sequence_parallel
