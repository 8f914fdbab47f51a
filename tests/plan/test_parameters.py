"""Planned parameters equal those of models really built: all at full size, every distinct rank of some layouts."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_emoe.plan.layout import Layout
from megatron_emoe.plan.parameters import padded_vocabulary
from tests.distributed import run_ranks

ONE = Layout(gpus=1, gpus_per_node=8, tp=1, pp=1, ep=1, etp=1, micro_batch=1, global_batch=256, seq=4096)


def on(gpus: int, tp: int, pp: int, ep: int, etp: int) -> Layout:
    return replace(ONE, gpus=gpus, tp=tp, pp=pp, ep=ep, etp=etp)


# Of the released checkpoints (docs/cards).
TOTALS = {
    "olmoe-7b": 6_919_161_856,
    "qwen1.5-moe-14b": 14_315_784_192,
    "deepseek-v2-lite-16b": 15_706_484_224,
    "ernie-4.5-21b": 21_825_436_160,
    "mixtral-47b": 46_702_792_704,
    "granite-1b": 1_334_628_352 - 49_155 * 1024 + 49_280 * 1024,  # of padding, to a multiple of 128
}

# Of which every part is built in a model above or below.
ONLY_PLANNED = {
    "moonlight-16b": 15_960_108_544,
    "qwen3-30b": 30_532_122_624,
    "llama2-7b-lora": 6_738_415_616 + 32 * (32 * 4096 + 256 * (4096 + 2 * 11008 + 11008 + 4096)),
}

LAYOUTS = {
    "olmoe-7b": [on(8, 1, 1, 8, 1), on(8, 2, 2, 2, 1), on(4, 4, 1, 1, 4), on(4, 2, 1, 2, 2)],
    "qwen1.5-moe-14b": [on(4, 1, 1, 4, 1), on(8, 2, 2, 4, 1), on(4, 2, 1, 2, 2)],
    "deepseek-v2-lite-16b": [on(4, 1, 4, 1, 1), on(8, 2, 2, 4, 1), on(6, 1, 3, 2, 1)],
    "ernie-4.5-21b": [on(4, 1, 1, 4, 1), on(8, 4, 2, 4, 1), on(8, 1, 4, 2, 1)],
    "mixtral-47b": [on(4, 2, 2, 2, 1)],
    "granite-1b": [],
}


def checked(name: str, layouts: list[Layout]) -> list[list[Any]]:
    """All distinct ranks of each layout, as planned and as built."""
    import torch

    from megatron_emoe.plan.check import check_parameters
    from megatron_emoe.plan.model import read_model

    torch.distributed.destroy_process_group()  # the fake one takes its place
    model = read_model(name, None, None)
    return [list(check_parameters(model, layout)) for layout in layouts]


@pytest.mark.slow
@pytest.mark.parametrize("name", TOTALS)
def test_every_rank_of_every_layout_holds_what_is_planned(name):
    (whole,), *split = run_ranks(checked, 1, name, [ONE, *LAYOUTS[name]])[0]
    assert whole.built.total == TOTALS[name]
    for layout, ranks in zip([ONE, *LAYOUTS[name]], [[whole], *split], strict=True):
        places = {(rank.pp, rank.ep, rank.tp) for rank in ranks}
        assert len(places) >= max(layout.pp * layout.ep, layout.pp * layout.tp), layout
        assert all(rank.built.total and rank.agrees for rank in ranks), [rank for rank in ranks if not rank.agrees]


def planned_totals(names: list[str]) -> list[int]:
    from megatron_emoe.plan.model import read_model
    from megatron_emoe.plan.parameters import stage_parameters

    return [stage_parameters(read_model(name, None, None).args, ONE, 0).total for name in names]


@pytest.mark.slow
def test_totals_of_the_largest_models():
    assert run_ranks(planned_totals, 1, list(ONLY_PLANNED))[0] == list(ONLY_PLANNED.values())


BIAS = "--moe-layer-freq [0,1,1,1]"  # and no --disable-bias-linear
FEATURES = [
    "--add-qkv-bias --num-query-groups 2 --group-query-attention",
    "--qk-layernorm --normalization LayerNorm",
    "--emoe-selection null-experts --emoe-null-experts 3 --moe-layer-freq 2",
    "--emoe-selection noisy-topk --moe-shared-expert-intermediate-size 48 --moe-shared-expert-gate",
    "--position-embedding-type learned_absolute --padded-vocab-size 160",
    BIAS,
]


def checked_file(path: str, layout: Layout) -> list[Any]:
    return checked(path, [layout])[0]


LORA = "--emoe-lora-experts 6 --emoe-lora-rank 4 --moe-router-topk 2"


@pytest.mark.slow
def test_low_rank_experts_on_a_dense_model(tmp_path):
    file = tmp_path / "model.args"
    file.write_text(Path(tiny_file(tmp_path, LORA)).read_text().replace("--num-experts 8 --moe-ffn-hidden-size 16", ""))
    layout = replace(on(4, 2, 2, 1, 1), seq=64, global_batch=4)
    ranks = run_ranks(checked_file, 1, str(file), layout)[0]
    assert len(ranks) == 4 and all(rank.agrees for rank in ranks), ranks
    # 2 layers of a stage: router, A and B of 6 experts of rank 4 on 32 x 128 and 64 x 32, half of it whole
    trained = 2 * (6 * 32 + 24 * 32 + 24 * 128 // 2 + 24 * 64 // 2 + 24 * 32)
    assert {rank.planned.trained for rank in ranks} == {trained}


@pytest.mark.slow
@pytest.mark.parametrize("words", FEATURES)
def test_features_that_the_models_have_not(words, tmp_path):
    layout = replace(on(4, 2, 2, 2, 1), seq=64, global_batch=4)
    ranks = run_ranks(checked_file, 1, tiny_file(tmp_path, words), layout)[0]
    assert len(ranks) == 4 and all(rank.agrees for rank in ranks), ranks


def tiny_file(folder: Path, words: str) -> str:
    file = folder / "model.args"
    file.write_text(
        "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --vocab-size 100 "
        "--max-position-embeddings 64 --swiglu --num-experts 8 --moe-ffn-hidden-size 16 "
        "--normalization RMSNorm --bf16 --hidden-dropout 0 "
        + ("" if words == BIAS else "--disable-bias-linear ")
        + words
    )
    return str(file)


def built_on(path: str, layout: Layout) -> str | tuple[list[bool], list[int]]:
    try:
        ranks = checked_file(path, layout)
    except ValueError as error:
        return str(error)
    return [rank.agrees for rank in ranks], [rank.built.expert for rank in ranks]


def test_ranks_that_share_experts_are_built_as_the_flags_say(tmp_path):
    layout = replace(on(2, 1, 1, 1, 2), seq=64, global_batch=4)
    agree, experts = run_ranks(built_on, 1, tiny_file(tmp_path, FEATURES[0]), layout)[0]
    assert agree == [True, True] and experts == [4 * 8 * 3 * 32 * 16 // 2] * 2
    assert "Bias in Moe is only supported when ETP==1" in run_ranks(built_on, 1, tiny_file(tmp_path, BIAS), layout)[0]


def wrong_vocabulary(path: str, layout: Layout) -> list[bool]:
    from megatron_emoe.plan import parameters as plan_parameters

    plan_parameters.padded_vocabulary = lambda args, tp: args.vocab_size
    return [rank.agrees for rank in checked_file(path, layout)]


def test_a_wrong_vocabulary_does_not_agree(tmp_path):
    path, layout = tiny_file(tmp_path, FEATURES[0]), replace(ONE, seq=64, global_batch=4)
    assert run_ranks(wrong_vocabulary, 1, path, layout)[0] == [False]


@pytest.mark.parametrize(("size", "multiple", "tp"), [(50304, 128, 1), (50304, 128, 8), (100, 7, 3), (1, 1, 1)])
def test_a_vocabulary_is_padded_as_megatron_does(size, multiple, tp):
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    args = Namespace(padded_vocab_size=None, vocab_size=size, make_vocab_size_divisible_by=multiple)
    assert padded_vocabulary(args, tp) == calculate_padded_vocab_size(size, multiple, tp, logging_enabled=False)


def broken_check(name: str) -> list[bool]:
    from megatron_emoe.plan import check as plan_check
    from megatron_emoe.plan.parameters import Parameters

    plan_check.stage_parameters = lambda *args, **kwargs: Parameters(1, 1)
    return [rank.agrees for rank in checked(name, [ONE])[0]]


def test_a_wrong_plan_does_not_agree():
    assert run_ranks(broken_check, 1, "olmoe-7b")[0] == [False]
