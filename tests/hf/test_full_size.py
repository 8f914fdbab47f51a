"""The full-size models, from configurations alone: published parameter counts, every tensor's name and shape."""

from collections import Counter
from math import prod

import pytest

from megatron_emoe.hf.architecture import experts_in, own_k
from megatron_emoe.hf.registry import architecture_of
from tests.hf.full_size import MODELS, PUBLISHED, SELECTION_BIASES, meta_model, on_disk


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
    if name == "llama_3_2_1b":  # 16 layers; 32 heads of 64 and 8 of k, v; MLP of 8192; tied
        H = 2048
        return 128256 * H + H + 16 * (2 * H * 32 * 64 + 2 * H * 8 * 64 + 2 * H + 3 * H * 8192)
    if name == "qwen3_30b_a3b":  # 48 layers; 32 heads of 128 and 4 of k, v, normed one by one; 128 experts of width 768
        H, attention, expert = 2048, 2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 2 * 128, 3 * 2048 * 768
        return 2 * 151936 * H + H + 48 * (attention + 2 * H + H * 128 + (k or 128) * expert)
    if name == "mixtral_8x7b":  # 32 layers; 32 heads of 128 and 8 of k, v; 8 experts of width 14336
        H, attention, expert = 4096, 2 * 4096 * 32 * 128 + 2 * 4096 * 8 * 128, 3 * 4096 * 14336
        return 2 * 32000 * H + H + 32 * (attention + 2 * H + H * 8 + (k or 8) * expert)
    if name == "granite_3_0_1b_a400m":  # 24 layers; 16 heads of 64 and 8 of k, v; 32 experts of width 512; tied
        H, attention, expert = 1024, 2 * 1024 * 1024 + 2 * 1024 * 8 * 64, 3 * 1024 * 512
        return 49155 * H + H + 24 * (attention + 2 * H + H * 32 + (k or 32) * expert)
    if name == "moonlight_16b_a3b":  # as DeepSeek-V2-Lite, but for the dense layer (11264) and the vocabulary
        return by_hand("deepseek_v2_lite", k) + 2 * (163840 - 102400) * 2048 + 3 * 2048 * (11264 - 10944)
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


@pytest.fixture(scope="module")
def groups(model):
    return architecture_of(model.config).groups(model.config)


def budgets(config) -> list[int]:
    k = own_k(config)
    return [k, 2 * k, 3 * k] if k else []


def test_there_is_a_configuration_of_every_model():
    assert PUBLISHED.keys() == set(MODELS)


def test_parameters_of_the_model_are_the_published_ones(name, model):
    counted = {n: p.numel() for n, p in model.named_parameters() if "e_score_correction_bias" not in n}
    routed = sum(size for n, size in counted.items() if ".experts." in n)
    total = sum(counted.values())
    active = [total - routed + routed * n // experts_in(model.config) for n in budgets(model.config)]
    assert (total, *active) == PUBLISHED[name]


def test_parameters_by_hand_are_the_published_ones(name, model):
    assert (by_hand(name), *(by_hand(name, n) for n in budgets(model.config))) == PUBLISHED[name]


def test_the_name_table_is_the_model_tensor_by_tensor(model, groups):
    named = Counter(name for group in groups for piece in group.pieces for name, _ in piece.hf)
    table = {name: shape for group in groups for name, shape in group.hf_tensors().items()}
    assert max(named.values()) == 1
    assert table == on_disk(model)


@pytest.mark.slow
def test_megatron_tensors_hold_the_published_parameters(name, model, groups):
    layout = architecture_of(model.config).layout(model.config)
    places = [layout.place(piece) for group in groups for piece in group.pieces]
    bias = sum(prod(place.size) for place in places if place.key.endswith("expert_bias"))
    assert sum(prod(place.size) for place in places) - bias == PUBLISHED[name][0]
    assert bias == SELECTION_BIASES.get(name, 0)


def test_chunks_fill_every_megatron_tensor_once(model, groups):
    layout = architecture_of(model.config).layout(model.config)
    shapes: dict[str, tuple[int, ...]] = {}
    filled: Counter[str] = Counter()
    corners = set()
    for place in (layout.place(piece) for group in groups for piece in group.pieces):
        assert shapes.setdefault(place.key, place.shape) == place.shape
        assert all(o + s <= w for o, s, w in zip(place.offset, place.size, place.shape, strict=True)), place
        corners.add((place.key, place.offset))
        filled[place.key] += prod(place.size)
    assert filled == {key: prod(shape) for key, shape in shapes.items()}
    assert len(corners) == sum(len(group.pieces) for group in groups)


def test_hf_and_megatron_chunks_are_of_one_size(groups):
    for group in groups:
        for piece in group.pieces:
            assert prod(piece.chunk_shape) == sum(prod(shape) for _, shape in piece.hf), piece
