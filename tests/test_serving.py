"""Command lines for a k': they must be ones that the tools take, and say what stock software cannot do."""

import dataclasses
import json
import shlex
from functools import partial
from pathlib import Path

import pytest

from megatron_emoe import sweep
from megatron_emoe.serving import K_KEYS, hf_key, serving_lines, sweep_command, tail_scale_at
from megatron_emoe.sweep import SweepData
from tests import hf_models, sweep_results, sweeps
from tests.distributed import run_ranks
from tests.sweeps import Answer

COMMAND = (
    "python -u tools/sweep_k.py --load 'runs/my model' --k 1 2 4 --k-per-layer 2,4 4,2 --layer-sensitivity "
    "--out=old.json --expert-model-parallel-size 2 --pipeline-model-parallel-size=2 --data-path held-out"
)

make_result = partial(sweep_results.make_result, "elastic", (), checkpoint="runs/my model", command=COMMAND)


def test_the_measuring_command_is_the_sweep_s_with_other_layers_and_file():
    command = sweep_command(make_result(), Path("new.json"), [(1, 3), (2, 3)])
    assert command == (
        "torchrun --nproc-per-node 4 tools/sweep_k.py --load 'runs/my model' --k 1 2 4 --layer-sensitivity "
        "--expert-model-parallel-size 2 --pipeline-model-parallel-size=2 --data-path held-out "
        "--k-per-layer 1,3 2,3 --out new.json"
    )


def test_the_measuring_command_of_a_sweep_with_another_origin():
    command = sweep_command(make_result(command="by hand"), Path("new.json"), [(1, 3)])
    assert command == (
        "torchrun --nproc-per-node 1 tools/sweep_k.py --load 'runs/my model' --data-path held-out "
        "--max-eval-tokens 64 --k-per-layer 1,3 --out new.json"
    )
    folder = make_result(command="by hand", framework="transformers", data=SweepData(path=[], tokens=64))
    assert sweep_command(folder, Path("new.json"), more="--layer-sensitivity") == (
        "python tools/sweep_k.py --hf 'runs/my model' --mock-data --max-eval-tokens 64 --layer-sensitivity "
        "--out new.json"
    )


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2 --context-parallel-size 2", 4),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 2),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size 4", 8),
        ("--expert-model-parallel-size 8 --pipeline-model-parallel-size 2", 16),
    ],
)
def test_ranks_are_the_fewest_that_the_layout_needs(flags, ranks):
    command = sweep_command(make_result(command=f"python tools/sweep_k.py {flags}"), Path("out.json"))
    assert command.startswith(f"torchrun --nproc-per-node {ranks} ")


def test_tail_scale_at_a_k():
    result = make_result(tail_scale={"6": 0.5, "10": 0.1})
    assert [tail_scale_at(result, k) for k in (2, 4, 6, 8, 10, 16)] == [1, 1, 0.5, pytest.approx(0.3), 0.1, 0.1]
    assert tail_scale_at(result, (2, 6)) == 0.5
    assert tail_scale_at(make_result(tail_scale={"0": 0.2}), 5) == 0.2
    assert tail_scale_at(make_result(), 8) == 1


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_key_of_k_is_read_from_the_model(tmp_path):
    ernie = write_config(tmp_path / "ernie", {"moe_k": 6, "num_experts_per_tok": 6})
    olmoe = write_config(tmp_path / "olmoe", {"num_experts_per_tok": 8})
    dense = write_config(tmp_path / "dense", {"hidden_size": 8})
    assert (hf_key(ernie), hf_key(olmoe), hf_key(dense)) == ("moe_k", "num_experts_per_tok", None)
    assert hf_key(tmp_path / "nowhere", olmoe) == "num_experts_per_tok"


def test_every_architecture_has_one_of_the_known_keys():
    from megatron_emoe.hf.architecture import architectures

    assert {architecture.k_key for architecture in architectures().values()} == set(K_KEYS)


def override(lines: list[str]) -> dict:
    (words,) = (shlex.split(line) for line in lines if "vllm serve" in line)
    assert words[3] == "--hf-overrides"
    return {words[2]: json.loads(words[4])}


def test_a_hugging_face_folder_is_served_as_it_is(tmp_path):
    folder = write_config(tmp_path / "my ernie", {"moe_k": 6})
    lines = serving_lines(make_result(checkpoint=str(folder), framework="transformers"), 8)
    assert override(lines) == {str(folder): {"moe_k": 8}}
    assert f'  AutoModelForCausalLM.from_pretrained("{folder}", moe_k=8)' in lines
    assert not any("Megatron" in line for line in lines)


def test_a_megatron_checkpoint_is_exported_first(tmp_path):
    write_config(tmp_path / "hf", {"num_experts_per_tok": 8})
    lines = serving_lines(make_result(checkpoint=str(tmp_path)), 8)
    assert f"  tools/sweep_k.py --load {tmp_path} --k 8" in lines
    assert f"  pretrain_emoe.py --load {tmp_path} --emoe-eval-k 8" in lines
    assert f"  tools/convert_checkpoint.py export --megatron {tmp_path} --out EXPORTED" in lines
    assert override(lines) == {"EXPORTED": {"num_experts_per_tok": 8}}


def test_stock_software_serves_no_k_per_layer_and_no_tail_scale():
    text = "\n".join(serving_lines(make_result(), (2, 6)))
    assert "vllm serve" not in text and "--emoe-eval-k" not in text
    assert "tools/sweep_k.py --load 'runs/my model' --k-per-layer 2,6" in text
    assert "do not serve one k' per layer: the loss above is not theirs" in text
    assert "set_active_experts(model, [2, 6])" in text

    scaled = make_result(tail_scale={"6": 0.25, "8": 0.1})
    text = "\n".join(serving_lines(scaled, 6))
    assert "--k 6 --emoe-tail-scale 6:0.25 8:0.1" in text and "--emoe-eval-k 6 --emoe-tail-scale" in text
    assert "do not serve a tail scale (here 0.25)" in text and "vllm serve" not in text
    assert "set_active_experts(model, 6, tail_scale={6: 0.25, 8: 0.1})" in text
    # At most k experts there is no tail: any software serves it.
    assert any("vllm serve" in line for line in serving_lines(scaled, 2))


def test_one_number_for_all_k_is_written_as_one():
    text = "\n".join(serving_lines(make_result(tail_scale={"0": 0.2}), 8))
    assert "--emoe-eval-k 8 --emoe-tail-scale 0.2" in text


def prepare_and_sweep(folder: Path) -> Answer:
    """A tiny model (k = 2, two MoE layers) with its first sweep."""
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save("qwen2_moe", folder / "hf"), folder / "megatron", report=lambda _line: None)
    sweeps.write_tokens(folder / "data")
    return sweeps.run_tool("sweep_k", *first_words(folder))


def first_words(folder: Path) -> list[str]:
    asked = {"load": str(folder / "megatron"), "k": [1, 2, 4], "layer_sensitivity": True}
    return sweeps.flags(folder / "data", folder / "first.json", **asked)


@pytest.mark.slow
def test_the_measuring_command_measures(tmp_path):
    """Run as it is printed, it adds the cell it promises to the file and leaves the others."""
    (answer,) = run_ranks(prepare_and_sweep, 1, tmp_path)
    assert answer.status is None, answer
    out = (tmp_path / "first.json").rename(tmp_path / "moved.json")
    first = sweep.load(out)
    first = dataclasses.replace(first, command=shlex.join(["python", "tools/sweep_k.py", *first_words(tmp_path)]))

    launcher, words = sweep_command(first, out, [(1, 4), (4, 1)]).split(" tools/sweep_k.py ")
    assert launcher == "torchrun --nproc-per-node 1"
    (answer,) = run_ranks(sweeps.run_tool, 1, "sweep_k", *shlex.split(words))
    assert answer.status is None, answer
    now = sweep.load(out)
    assert [cell.k for cell in first.cells] == [1, 2, 4, (1, 2), (2, 1), (2, 4), (4, 2)]
    assert {cell.k for cell in now.cells} - {cell.k for cell in first.cells} == {(1, 4), (4, 1)}
    assert [cell for cell in now.cells if cell.k not in ((1, 4), (4, 1))] == list(first.cells)
