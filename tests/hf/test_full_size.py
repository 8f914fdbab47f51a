"""The full-size models, from configurations alone: published parameter counts, every tensor's name and shape."""

from collections import Counter
from math import prod

import pytest

from megatron_emoe.hf.registry import architecture_of
from tests.hf.full_size import MODELS, PUBLISHED, meta_model, on_disk


def by_hand(name: str, k: int | None = None) -> int:
    """Parameters with k active experts (None: all), from the models' papers and cards; H is the hidden size."""
    if name == "olmoe_1b_7b":  # 16 layers; 16 heads of 128, norms over all of q and of k; 64 experts of width 1024
        H, attention, expert = 2048, 4 * 2048 * 2048 + 2 * 2048, 3 * 2048 * 1024
        return 2 * 50304 * H + H + 16 * (attention + 2 * H + H * 64 + (k or 64) * expert)
    if name == "qwen1_5_moe_a2_7b":  # 24 layers; biased q, k, v; a gated shared expert of width 5632; 60 of width 1408
        H, attention, expert = 2048, 4 * 2048 * 2048 + 3 * 2048, 3 * 2048 * 1408
        return 2 * 151936 * H + H + 24 * (attention + 2 * H + H * 60 + 3 * H * 5632 + H + (k or 60) * expert)
    if name == "deepseek_v2_lite":  # 27 layers, the first dense (10944); latent 512, heads 128 + 64 and 128; 2 shared
        H, expert = 2048, 3 * 2048 * 1408
        attention = H * 16 * (128 + 64) + H * (512 + 64) + 512 + 512 * 16 * (128 + 128) + 16 * 128 * H
        moe = H * 64 + 2 * expert + (k or 64) * expert
        return 2 * 102400 * H + H + 27 * (attention + 2 * H) + 3 * H * 10944 + 26 * moe
    H, expert = 2560, 3 * 2560 * 1536  # ERNIE: 28 layers, the first dense (12288); 20 heads and 4 of k, v; 2 shared
    attention = 2 * H * 20 * 128 + 2 * H * 4 * 128
    moe = H * 64 + 2 * expert + (k or 64) * expert
    return 103424 * H + H + 28 * (attention + 2 * H) + 3 * H * 12288 + 27 * moe


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return meta_model(name)


def k_and_experts(config) -> tuple[int, int]:
    return config.num_experts_per_tok, config.num_experts


def test_there_is_a_configuration_of_every_model():
    assert PUBLISHED.keys() == set(MODELS)


def test_parameters_of_the_model_are_the_published_ones(name, model):
    k, experts = k_and_experts(model.config)
    counted = {n: p.numel() for n, p in model.named_parameters() if "e_score_correction_bias" not in n}
    routed = sum(size for n, size in counted.items() if ".mlp.experts." in n)
    total = sum(counted.values())
    active = [total - routed + routed * n // experts for n in (k, 2 * k, 3 * k)]
    assert (total, *active) == PUBLISHED[name]


def test_parameters_by_hand_are_the_published_ones(name, model):
    k, _ = k_and_experts(model.config)
    assert (by_hand(name), *(by_hand(name, n) for n in (k, 2 * k, 3 * k))) == PUBLISHED[name]


def test_the_name_table_is_the_model_tensor_by_tensor(model):
    groups = architecture_of(model.config).groups(model.config)
    named = Counter(name for group in groups for piece in group.pieces for name, _ in piece.hf)
    table = {name: shape for group in groups for name, shape in group.hf_tensors().items()}
    assert max(named.values()) == 1
    assert table == on_disk(model)


@pytest.mark.slow
def test_megatron_tensors_hold_the_published_parameters(name, model):
    architecture = architecture_of(model.config)
    pieces = [piece for group in architecture.groups(model.config) for piece in group.pieces]
    places = [architecture.layout(model.config).place(piece) for piece in pieces]
    bias = sum(prod(place.size) for place in places if place.key.endswith("expert_bias"))
    assert sum(prod(place.size) for place in places) - bias == PUBLISHED[name][0]
    assert bias == (27 * 64 if name == "ernie4_5_21b_a3b" else 0)


def test_chunks_fill_every_megatron_tensor_once(model):
    architecture = architecture_of(model.config)
    layout = architecture.layout(model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    filled: Counter[str] = Counter()
    corners = set()
    for place in (layout.place(piece) for group in architecture.groups(model.config) for piece in group.pieces):
        assert shapes.setdefault(place.key, place.shape) == place.shape
        assert all(o + s <= w for o, s, w in zip(place.offset, place.size, place.shape, strict=True)), place
        corners.add((place.key, place.offset))
        filled[place.key] += prod(place.size)
    assert filled == {key: prod(shape) for key, shape in shapes.items()}
    assert len(corners) == sum(len(group.pieces) for group in architecture.groups(model.config))


def test_hf_and_megatron_chunks_are_of_one_size(model):
    for group in architecture_of(model.config).groups(model.config):
        for piece in group.pieces:
            assert prod(piece.chunk_shape) == sum(prod(shape) for _, shape in piece.hf), piece
