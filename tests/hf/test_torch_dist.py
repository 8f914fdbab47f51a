"""Megatron's checkpoint format, written and read in parts; torch's own reader and writer are the other side."""

import re

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_emoe.hf.pieces import Place
from megatron_emoe.hf.torch_dist import COMMON_STATE, TorchDistReader, TorchDistWriter

WHOLE = torch.arange(4 * 6 * 2, dtype=torch.float32).reshape(4, 6, 2)
VECTOR = torch.randn(7).bfloat16()
VECTOR_PLACE = Place("vector", (7,), (0,), (7,))


def rows_of(layer: int, first: int, count: int) -> Place:
    return Place("whole", (4, 6, 2), (layer, first, 0), (1, count, 2))


def part(place: Place) -> torch.Tensor:
    window = tuple(slice(start, start + size) for start, size in zip(place.offset, place.size, strict=True))
    return WHOLE[window]


def write(folder) -> None:
    """Layers in files of their own, each in two chunks of 2 and 4 rows; written in an odd order."""
    writer, results = TorchDistWriter(folder), []
    places = {layer: [rows_of(layer, 0, 2), rows_of(layer, 2, 4)] for layer in range(4)}
    for layer in (2, 0, 3, 1):
        chunks = [(place, torch.float32, lambda place=place: part(place)) for place in places[layer]]
        for place in places[layer]:
            writer.declare(place, torch.float32)
        results += writer.write(layer, chunks, {})
    writer.declare(VECTOR_PLACE, torch.bfloat16)
    writer.declare_object(COMMON_STATE)
    results += writer.write(4, [(VECTOR_PLACE, torch.bfloat16, lambda: VECTOR)], {COMMON_STATE: {"iteration": 3}})
    writer.finish(results)


def test_torch_reads_what_is_written(tmp_path):
    write(tmp_path)
    state = {"whole": torch.zeros(4, 6, 2), "vector": torch.zeros(7, dtype=torch.bfloat16)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(state["whole"], WHOLE) and torch.equal(state["vector"], VECTOR)


def test_megatron_reads_the_common_state(tmp_path):
    from megatron.core.dist_checkpointing import load_common_state_dict

    write(tmp_path)
    assert load_common_state_dict(tmp_path) == {"iteration": 3}


def test_parts_are_read_across_the_chunks_that_hold_them(tmp_path):
    write(tmp_path)
    wanted = [rows_of(3, 1, 3), rows_of(0, 0, 6), rows_of(2, 5, 1), VECTOR_PLACE]
    found = TorchDistReader(tmp_path).read(wanted)
    assert all(torch.equal(a, part(place)) for a, place in zip(found[:3], wanted[:3], strict=True))
    assert torch.equal(found[3], VECTOR)


def test_what_torch_writes_is_read(tmp_path):
    dcp.save({"whole": WHOLE}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(TorchDistReader(tmp_path).read([rows_of(1, 1, 4)])[0], part(rows_of(1, 1, 4)))


def test_a_chunk_is_made_only_when_it_is_written(tmp_path):
    calls = []
    chunk = (VECTOR_PLACE, torch.bfloat16, lambda: calls.append("made") or VECTOR)
    assert calls == []
    TorchDistWriter(tmp_path).write(0, [chunk], {})
    assert calls == ["made"]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (Place("other", (7,), (0,), (7,)), "other is missing"),
        (Place("vector", (9,), (0,), (9,)), "vector has shape [7], expected [9]"),
        (Place("vector", (7, 1), (0, 0), (7, 1)), "vector has shape [7], expected [7, 1]"),
    ],
)
def test_a_chunk_that_is_not_there(tmp_path, place, message):
    write(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: {message}")):
        TorchDistReader(tmp_path).read([place])


def test_a_tensor_that_is_not_stored_whole(tmp_path):
    writer = TorchDistWriter(tmp_path)
    writer.declare(rows_of(0, 0, 2), torch.float32)
    writer.finish(writer.write(0, [(rows_of(0, 0, 2), torch.float32, lambda: part(rows_of(0, 0, 2)))], {}))
    with pytest.raises(ValueError, match="whole is not stored whole"):
        TorchDistReader(tmp_path).read([rows_of(0, 0, 4)])


def test_damage_is_named(tmp_path):
    write(tmp_path)
    reader = TorchDistReader(tmp_path)
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="not readable"):
        reader.read([rows_of(0, 0, 6)])
    file.unlink()
    with pytest.raises(ValueError, match="not readable"):
        reader.read([rows_of(0, 0, 6)])
    (tmp_path / ".metadata").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable torch_dist checkpoint"):
        TorchDistReader(tmp_path)
