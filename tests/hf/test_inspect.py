"""`inspect`: what it says of a checkpoint is so, and it reads headers only."""

import json
import os
import re
import struct
import subprocess
from dataclasses import asdict
from math import prod
from pathlib import Path

import pytest
import torch

from megatron_emoe.hf import safetensors_files
from megatron_emoe.hf.import_model import import_model
from megatron_emoe.hf.inspect_model import Inspection, inspect
from megatron_emoe.hf.safetensors_files import SafetensorsFolder
from megatron_emoe.hf.torch_dist import TorchDistReader
from tests import hf_models, programs
from tests.distributed import REPO, run_ranks
from tests.hf.full_size import CONFIGS, PUBLISHED, SELECTION_BIASES, meta_model, on_disk
from tests.tiny import flags, train

pytestmark = pytest.mark.slow

SOME = ("olmoe_1b_7b", "deepseek_v2_lite", "ernie4_5_21b_a3b", "llama_3_2_1b", "mixtral_8x7b", "moonlight_16b_a3b")
ELASTIC = {
    "emoe_selection": "coactivation",
    "emoe_pool_k": 6,
    "emoe_qk_norm": "full",
    "qk_layernorm": True,
}


def convert(hf: Path, out: Path) -> None:
    import_model(hf, out, report=lambda line: None)


@pytest.fixture(scope="module", params=hf_models.MODEL_TYPES)
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model in bf16 with k = 3 of 8 experts: the Hugging Face folder and its import."""
    folder = tmp_path_factory.mktemp(request.param)
    ernie = request.param == "ernie4_5_moe"
    hf = hf_models.save(request.param, folder / "hf", dtype=torch.bfloat16, num_experts_per_tok=3, mtp=ernie)
    run_ranks(convert, 1, hf, folder / "megatron")
    return hf, folder / "megatron"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two elastic steps at expert parallelism 2; 97 words, padded to 104."""
    folder = tmp_path_factory.mktemp("trained")
    changes = ELASTIC | {"vocab_size": 97, "train_iters": 2, "save": str(folder), "save_interval": 1}
    run_ranks(train, 2, flags(**changes, expert_model_parallel_size=2, use_distributed_optimizer=True))
    return folder


def sparse_model(name: str, folder: Path) -> int:
    """The full-size model in files of up to 4 GB that occupy no disk: a header, then a hole. Returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    shards: list[dict] = [{}]
    end = total = 0
    for tensor, shape in on_disk(meta_model(name)).items():
        fp32 = tensor.endswith("e_score_correction_bias")
        size = (4 if fp32 else 2) * prod(shape)
        if end + size > 4e9:
            shards, end = [*shards, {}], 0
        start, end, total = end, end + size, total + size
        shards[-1][tensor] = {"dtype": "F32" if fp32 else "BF16", "shape": shape, "data_offsets": [start, end]}
    for number, header in enumerate(shards):
        write_sparse(folder / f"model-{number}.safetensors", header)
    files = {tensor: f"model-{number}.safetensors" for number, header in enumerate(shards) for tensor in header}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return total


def write_sparse(path: Path, header: dict) -> None:
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + max(tensor["data_offsets"][1] for tensor in header.values()))


@pytest.mark.parametrize("name", SOME)
def test_full_size_models_have_their_published_counts(name, tmp_path):
    size = sparse_model(name, tmp_path / "hf")
    seen = inspect(tmp_path / "hf")
    total, *active = PUBLISHED[name]
    assert seen.parameters == total
    assert seen.active == (dict(zip([seen.k, 2 * seen.k, 3 * seen.k], active, strict=True)) if active else {})
    assert seen.dtypes == {"bfloat16": total}
    assert seen.beside == ({"selection bias": SELECTION_BIASES[name]} if name in SELECTION_BIASES else {})
    assert seen.bytes == size
    assert (seen.iteration, seen.has_hf, seen.emoe) == (None, None, None)


def test_a_hugging_face_folder_is_counted_as_transformers_does(pair):
    hf, _ = pair
    model_type = json.loads((hf / "config.json").read_text())["model_type"]
    model = hf_models.build(model_type, dtype=torch.bfloat16, num_experts_per_tok=3)
    named = {n: p for n, p in model.named_parameters() if "e_score_correction_bias" not in n}
    routed = sum(p.numel() for n, p in named.items() if ".mlp.experts." in n)
    total = sum(p.numel() for p in named.values())
    seen = inspect(hf)
    assert (seen.architecture, seen.layers, seen.hidden_size) == (model_type, model.config.num_hidden_layers, 32)
    assert (seen.experts, seen.k, seen.parameters) == (8, 3, total)
    # 3 x 3 = 9 are more than there are: 8
    assert seen.active == {k: total - routed + routed * k // 8 for k in (3, 6)} | {8: total}
    fp32 = sum(p.numel() for p in named.values() if p.dtype.itemsize == 4)
    assert seen.dtypes == {"bfloat16": total - fp32} | ({"float32": fp32} if fp32 else {})
    kept = getattr(model, "_keep_in_fp32_modules_strict", None)  # ERNIE's router; in newer releases DeepSeek-V2's too
    assert bool(fp32) == bool(kept)


def test_what_is_carried_along_is_told_apart(pair):
    hf, _ = pair
    beside = inspect(hf).beside
    if "ernie" not in inspect(hf).architecture:
        assert beside == {}
        return
    # ERNIE's block: 2 layer norms and 2 of its own (4 x 32), q and o (2 x 32 x 32), k and v (2 x 16 x 32), MLP
    # (3 x 48 x 32), projection (32 x 64). Bias: 2 layers x 8 experts.
    assert beside == {"carried along": 128 + 2048 + 1024 + 4608 + 2048, "selection bias": 16}


def test_an_import_is_the_same_model(pair):
    hf, megatron = pair
    ours, theirs = inspect(megatron), inspect(hf)
    for name in ("architecture", "layers", "hidden_size", "experts", "k", "parameters", "active", "dtypes"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.beside == {kind: n for kind, n in theirs.beside.items() if kind != "carried along"}
    assert (ours.iteration, ours.elastic, ours.layout) == ("release", {}, None)
    assert (ours.optimizer_bytes, ours.has_hf) == (0, True)
    norm = {"olmoe": "full", "deepseek_v2": "latent"}.get(ours.architecture)
    assert ours.features == ({"--emoe-qk-norm": norm} if norm else {})
    assert inspect(megatron / "release") == ours


def test_a_trained_checkpoint_tells_how_it_was_trained(trained):
    seen = inspect(trained)
    assert seen.iteration == 2
    assert seen.elastic == {"--emoe-selection": "coactivation", "--emoe-pool-k": 6}
    assert seen.features == {"--emoe-qk-norm": "full"}
    assert seen.layout == {"tensor": 1, "pipeline": 1, "expert": 2, "context": 1, "data": 2}
    assert (seen.architecture, seen.has_hf) == (None, False)
    # Embedding and head 2 x 97 x 32 (97 words, not the 104 rows stored), final norm 32; each of 2 layers: attention
    # 4 x 32 x 32, norms 2 x 32 and over q and k 2 x 32, router 8 x 32, experts 8 x 3 x 32 x 16.
    fixed = 2 * 97 * 32 + 32 + 2 * (4 * 32 * 32 + 4 * 32 + 8 * 32)
    assert seen.parameters == fixed + 2 * 8 * 3 * 32 * 16
    assert seen.active == {k: fixed + 2 * k * 3 * 32 * 16 for k in (2, 4, 6)}
    assert seen.optimizer_bytes >= 2 * 4 * seen.parameters  # Adam's two moments in fp32, at the least


def test_one_iteration_may_be_named(trained):
    assert inspect(trained / "iter_0000001").iteration == 1
    assert inspect(trained / "iter_0000001").parameters == inspect(trained).parameters


def test_no_tensor_is_read(pair, trained, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(SafetensorsFolder, "read", refuse)
    monkeypatch.setattr(TorchDistReader, "read", refuse)
    for folder in (*pair, trained):
        assert inspect(folder).parameters


def test_text_and_json_hold_all_of_it(pair, trained):
    for folder in (*pair, trained):
        seen = inspect(folder)
        stored = json.loads(seen.as_json())
        stored["active"] = {int(k): number for k, number in stored["active"].items()}
        assert Inspection(**stored) == seen and stored == asdict(seen)
        text = seen.as_text()
        assert text.startswith(f"{folder}: {seen.kind}\n")
        assert re.search(rf"^  parameters +{seen.parameters:,}$", text, re.MULTILINE)
        for number in seen.active.values():
            assert f"{number:,}" in text
    assert "--emoe-selection coactivation, --emoe-pool-k 6" in text
    assert "ranks: tensor 1, pipeline 1, expert 2, context 1, data 2" in text
    assert "missing: an export needs it" in text and "not recorded (no hf/ folder)" in text


def test_the_command_prints_nothing_but_json(trained):
    command = [programs.python(), "tools/convert_checkpoint.py", "inspect", trained, "--json"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["parameters"] == inspect(trained).parameters


def test_the_command_refuses_with_one_line(tmp_path):
    command = [programs.python(), "tools/convert_checkpoint.py", "inspect", tmp_path / "none"]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"convert_checkpoint.py inspect: error: {tmp_path}/none: no such folder\n")


def test_an_export_s_note_is_shown(pair, tmp_path):
    hf, _ = pair
    folder = tmp_path / "hf"
    folder.mkdir()
    for file in hf.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"emoe": {"k_train": 3, "pool_k": 6}}))
    assert inspect(folder).emoe == {"k_train": 3, "pool_k": 6}
    assert "k_train 3, pool_k 6" in inspect(folder).as_text()


def test_sharded_and_fused_folders_are_the_same_model(tmp_path):
    one = inspect(hf_models.save("olmoe", tmp_path / "one"))
    sharded = hf_models.save("olmoe", tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    fused = hf_models.save("olmoe", tmp_path / "fused", save_original_format=False)
    for folder in (sharded, fused):
        seen = inspect(folder)
        assert (seen.parameters, seen.active, seen.bytes) == (one.parameters, one.active, one.bytes)


# Bad input.


def test_no_such_folder(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/none: no such folder"):
        inspect(tmp_path / "none")


def test_neither_side(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: neither a Hugging Face model .* nor a Megatron checkpoint"):
        inspect(tmp_path)


def test_an_unknown_architecture(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "phimoe"}')
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: model_type 'phimoe' is not supported"):
        inspect(tmp_path)


def test_truncated_weights(tmp_path):
    hf = hf_models.save("olmoe", tmp_path / "hf")
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{file}: not a readable safetensors file"):
        inspect(hf)


def test_weights_too_large_to_be_mapped(tmp_path, monkeypatch):
    def refuse(file, framework):
        raise RuntimeError(f"unable to mmap 9 bytes from file <{file}>: Cannot allocate memory (12)")

    hf = hf_models.save("olmoe", tmp_path / "hf")
    monkeypatch.setattr(safetensors_files, "safe_open", refuse)
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file .unable to mmap 9 bytes"):
        inspect(hf)


def test_a_tracker_without_its_checkpoint(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match=f"inspect {tmp_path}: iter_0000007 is missing"):
        inspect(tmp_path)


def test_damaged_metadata(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    (tmp_path / "iter_0000007").mkdir()
    (tmp_path / "iter_0000007/.metadata").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match=f"inspect {tmp_path}/iter_0000007: not a readable torch_dist checkpoint"):
        inspect(tmp_path)
