"""Reading safetensors folders: what is damaged or contradictory is refused before any tensor is read."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_emoe.hf.safetensors_files import SafetensorsFolder, write_index, write_shard


def folder_of(path: Path, **files: dict[str, torch.Tensor]) -> Path:
    """A folder with these files (without .safetensors); more than one get an index."""
    for name, tensors in files.items():
        save_file(tensors, path / f"{name}.safetensors")
    if len(files) > 1:
        weight_map = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SafetensorsFolder(path)


def test_one_file_and_several_read_alike(tmp_path):
    a, b = torch.randn(3, 4), torch.randn(5).bfloat16()
    for name in ("single", "sharded"):
        (tmp_path / name).mkdir()
    single = SafetensorsFolder(folder_of(tmp_path / "single", model={"a": a, "b": b}))
    sharded = SafetensorsFolder(folder_of(tmp_path / "sharded", one={"a": a}, two={"b": b}))
    for folder in (single, sharded):
        assert {name: stored.shape for name, stored in folder.tensors.items()} == {"a": (3, 4), "b": (5,)}
        read = folder.read(["b", "a"])
        assert torch.equal(read["a"], a) and torch.equal(read["b"], b) and read["b"].dtype == torch.bfloat16


def test_fused_experts_are_read_by_their_single_names(tmp_path):
    gate_up, down = torch.randn(2, 6, 4), torch.randn(2, 4, 3)  # 2 experts of width 3, hidden size 4
    tensors = {"l.mlp.experts.gate_up_proj": gate_up, "l.mlp.experts.down_proj": down}
    folder = SafetensorsFolder(folder_of(tmp_path, model=tensors))
    read = folder.read(folder.tensors)
    assert sorted(read) == [f"l.mlp.experts.{e}.{part}_proj.weight" for e in (0, 1) for part in ("down", "gate", "up")]
    assert torch.equal(read["l.mlp.experts.1.gate_proj.weight"], gate_up[1, :3])
    assert torch.equal(read["l.mlp.experts.1.up_proj.weight"], gate_up[1, 3:])
    assert torch.equal(read["l.mlp.experts.0.down_proj.weight"], down[0])


def test_a_folder_without_weights(tmp_path):
    refused(tmp_path, f"^{re.escape(str(tmp_path))}: no weights")


def test_pickled_weights_are_named_and_not_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refused(tmp_path, r"pytorch_model\.bin is pickled and not read")


@pytest.mark.parametrize("keep", [0, 4, 40, -8])
def test_a_truncated_file(tmp_path, keep):
    folder_of(tmp_path, model={"a": torch.randn(64, 64)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, r"model\.safetensors: not a readable safetensors file")


def test_a_corrupt_header(tmp_path):
    folder_of(tmp_path, model={"a": torch.randn(4)})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[10:20] = b"\xff" * 10
    path.write_bytes(content)
    refused(tmp_path, r"model\.safetensors: not a readable safetensors file")


def test_a_missing_shard(tmp_path):
    folder_of(tmp_path, one={"a": torch.randn(4)}, two={"b": torch.randn(4)})
    (tmp_path / "two.safetensors").unlink()
    refused(tmp_path, r"index\.json: names two\.safetensors for b, and there is no such file")


def test_an_index_that_names_a_tensor_that_its_file_lacks(tmp_path):
    folder_of(tmp_path, one={"a": torch.randn(4)}, two={"b": torch.randn(4)})
    save_file({"c": torch.randn(4)}, tmp_path / "two.safetensors")
    refused(tmp_path, r"index\.json: names b in two\.safetensors, which does not hold it")


def test_a_tensor_that_the_index_does_not_name(tmp_path):
    folder_of(tmp_path, one={"a": torch.randn(4)}, two={"b": torch.randn(4)})
    save_file({"b": torch.randn(4), "c": torch.randn(4)}, tmp_path / "two.safetensors")
    refused(tmp_path, r"two\.safetensors: holds c, which model\.safetensors\.index\.json does not name")


def test_a_tensor_in_two_files(tmp_path):
    folder_of(tmp_path, one={"a": torch.randn(4)}, two={"b": torch.randn(4)})
    save_file({"b": torch.randn(4), "a": torch.randn(4)}, tmp_path / "two.safetensors")
    refused(tmp_path, r"two\.safetensors: holds a, which one\.safetensors holds too")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 10**5])
def test_a_file_that_is_no_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"index\.json: not a safetensors index")


def test_an_index_may_not_point_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": torch.randn(4)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"a": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(inside, "there is no such file in")


def test_a_name_that_no_file_can_have(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x" * 300}}))
    refused(tmp_path, "there is no such file in")


def test_a_type_that_is_not_a_float(tmp_path):
    folder_of(tmp_path, model={"a": torch.zeros(4, dtype=torch.int8)})
    refused(tmp_path, r"model\.safetensors: a is of type I8; supported: F64, F32, F16, BF16")


def test_shapes_are_compared_with_the_configuration(tmp_path):
    folder = SafetensorsFolder(folder_of(tmp_path, model={"a": torch.randn(4, 2)}))
    folder.check_shapes({"a": (4, 2)}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"a has shape \[4, 2\], .*config\.json leads to \[4, 3\]"):
        folder.check_shapes({"a": (4, 3)}, tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"b is missing, which .*config\.json asks for"):
        folder.check_shapes({"b": (1,)}, tmp_path / "config.json")


def test_shards_and_index_are_what_transformers_and_this_reader_expect(tmp_path):
    a, b = torch.randn(3, 4), torch.randn(5).bfloat16()
    write_shard({"a": a}, tmp_path / "x.safetensors")
    write_shard({"b": b}, tmp_path / "y.safetensors")
    write_index({"x.safetensors": {"a": a.nbytes}, "y.safetensors": {"b": b.nbytes}}, tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 58}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    read = SafetensorsFolder(tmp_path).read(["a", "b"])
    assert torch.equal(read["a"], a) and torch.equal(read["b"], b)
