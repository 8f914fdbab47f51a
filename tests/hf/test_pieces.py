"""The vocabulary of the name tables, against naive loops and hand-made keys."""

import torch

from megatron_emoe.hf.pieces import Layout, PackQKV, Piece, gated


def rows(letter: str, count: int) -> torch.Tensor:
    """Row n of q, k or v is [code of the letter, n]: a row shows where it came from."""
    return torch.tensor([[ord(letter), n] for n in range(count)])


def test_qkv_is_packed_group_by_group_as_a_naive_loop_does():
    groups, per_group, width = 2, 3, 4  # 6 query heads, 2 key heads, heads of width 4
    q, k, v = rows("q", groups * per_group * width), rows("k", groups * width), rows("v", groups * width)
    expected = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            expected += [q[head * width + n] for n in range(width)]
        expected += [k[group * width + n] for n in range(width)] + [v[group * width + n] for n in range(width)]
    packed = PackQKV(groups).pack([q, k, v], (40, 2))
    assert torch.equal(packed, torch.stack(expected))


def test_unpacking_inverts_packing_for_weights_and_biases():
    for columns in ((), (5,)):
        parts = [torch.randn(count, *columns) for count in (24, 8, 8)]
        packed = PackQKV(2).pack(parts, (40, *columns))
        found = PackQKV(2).unpack(packed, [tuple(part.shape) for part in parts])
        assert all(torch.equal(a, b) for a, b in zip(parts, found, strict=True))


def expert_pieces() -> list[Piece]:
    return gated("mlp.experts.experts", "model.layers.3.mlp.experts.5", width=16, hidden=32, layer=3, expert=5)


def test_gate_lies_above_up_in_linear_fc1():
    gate, up, down = expert_pieces()
    assert [piece.hf[0][0].split(".")[-2] for piece in (gate, up, down)] == ["gate_proj", "up_proj", "down_proj"]
    assert (gate.shape, gate.first_row, gate.chunk_shape) == ((32, 32), 0, (16, 32))
    assert (up.shape, up.first_row, up.chunk_shape) == ((32, 32), 16, (16, 32))
    assert (down.shape, down.chunk_shape) == ((32, 16), (32, 16))


def test_places_where_all_layers_are_one_tensor():
    place = Layout(stacked=True, num_layers=4, num_experts=8).place(expert_pieces()[1])
    assert place.key == "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert (place.shape, place.offset, place.size) == ((4, 8, 32, 32), (3, 5, 16, 0), (1, 1, 16, 32))


def test_places_where_each_layer_is_a_tensor():
    place = Layout(stacked=False, num_layers=4, num_experts=8).place(expert_pieces()[1])
    assert place.key == "decoder.layers.3.mlp.experts.experts.linear_fc1.weight"
    assert (place.shape, place.offset, place.size) == ((8, 32, 32), (5, 16, 0), (1, 16, 32))


def test_each_linear_layer_has_one_extra_state():
    gate, up, down = expert_pieces()
    stacked, single = (Layout(stacked, num_layers=4, num_experts=8) for stacked in (True, False))
    prefix = "mlp.experts.experts.linear_fc1._extra_state"
    assert stacked.extra_state(gate) == f"decoder.layers.{prefix}/shard_3.5_4.8"
    assert single.extra_state(gate) == f"decoder.layers.3.{prefix}/shard_5_8"
    assert stacked.extra_state(up) is None  # the other half of the same layer
    assert single.extra_state(down) == "decoder.layers.3.mlp.experts.experts.linear_fc2._extra_state/shard_5_8"


def test_norms_that_stand_alone_have_one_too():
    """Seen in what Transformer Engine 2.20.2 saves: its router, embedding and fused norms have none."""
    stacked = Layout(stacked=True, num_layers=4, num_experts=8)
    for name, key in (
        ("pre_mlp_layernorm.weight", "decoder.layers.pre_mlp_layernorm._extra_state/shard_3_4"),
        ("self_attention.linear_qkv.layer_norm_weight", None),
        ("self_attention.q_layernorm.weight", None),
        ("mlp.router.weight", None),
    ):
        assert stacked.extra_state(Piece(name, (32,), (("a", (32,)),), layer=3)) == key
    final = Piece("decoder.final_layernorm.weight", (32,), (("a", (32,)),))
    assert stacked.extra_state(final) == "decoder.final_layernorm._extra_state/shard_0_1"
