"""Command lines for a k': they must be ones that the tools take, and say what stock software cannot do."""

import dataclasses
import json
import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepData, SweepResult
from megatron_emoe.sweep.serving import K_KEYS, held_out_command, hf_key, serving_lines, sweep_command, tail_scale_at
from tests import hf_models, sweep_results, sweeps
from tests.distributed import run_ranks
from tests.sweeps import Answer

COMMAND = (
    "python -u tools/sweep_k.py --load 'runs/my model' --k 1 2 4 --k-per-layer 2,4 4,2 --layer-sensitivity "
    "--out=old.json --expert-model-parallel-size 2 --pipeline-model-parallel-size=2 --data-path held-out"
)

make_result = partial(sweep_results.make_result, "elastic", cells=(), checkpoint="runs/my model", command=COMMAND)


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
        "--k 4 --out new.json"
    )


def test_a_k_to_try_in_each_layer_comes_from_the_cells():
    cells = [sweep_results.make_cell(ks, 2.0) for ks in (6, (2, 4))]
    lists_alone = make_result(command="sweep_k.py --k-per-layer 2,4", cells=cells)
    assert sweep_command(lists_alone, Path("a.json"), more="--layer-sensitivity").endswith(
        "tools/sweep_k.py --layer-sensitivity --k 2 4 6 --out a.json"
    )
    for given in ("--k 3 5", "--k=3"):
        command = sweep_command(make_result(command=f"sweep_k.py {given} --layer-sensitivity"), Path("a.json"))
        assert command.endswith(f"tools/sweep_k.py {given} --layer-sensitivity --out a.json")


def test_flag_files_are_spelled_out_where_they_can_be_read(tmp_path):
    layout = tmp_path / "layout.args"
    layout.write_text("--expert-model-parallel-size 8 --out old.json")
    result = make_result(command=f"sweep_k.py --k 4 --out s.json @{layout} --data-path H")
    assert sweep_command(result, Path("new.json")) == (
        "torchrun --nproc-per-node 8 tools/sweep_k.py --k 4 --expert-model-parallel-size 8 --data-path H --out new.json"
    )
    layout.unlink()  # then it stays: it is no value of --out
    command = sweep_command(result, Path("new.json"))
    assert command.endswith(f" tools/sweep_k.py --k 4 @{layout} --data-path H --out new.json")


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
    from megatron_emoe.hf.registry import architectures

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
    assert f"  tools/convert_checkpoint.py export --megatron {tmp_path} --out EXPORTED" in lines
    assert override(lines) == {"EXPORTED": {"num_experts_per_tok": 8}}


def test_stock_software_serves_no_k_per_layer_and_no_tail_scale():
    text = "\n".join(serving_lines(make_result(), (2, 6)))
    assert "--hf-overrides" not in text
    assert """VLLM_PLUGINS=emoe vllm serve EXPORTED --additional-config '{"emoe": {"k": [2, 6]}}'""" in text
    assert "do not serve one k' per layer: the loss above is not theirs" in text
    assert "set_active_experts(model, [2, 6])" in text

    scaled = make_result(tail_scale={"6": 0.25, "8": 0.1})
    text = "\n".join(serving_lines(scaled, 6))
    assert "do not serve a tail scale (here 0.25)" in text and "--hf-overrides" not in text
    assert "set_active_experts(model, 6, tail_scale={6: 0.25, 8: 0.1})" in text
    # At most k experts there is no tail: any software serves it.
    assert any("--hf-overrides" in line for line in serving_lines(scaled, 2))


@pytest.mark.parametrize("k", [1, 6])
def test_stock_software_serves_learned_scales_at_the_k_of_training_alone(k):
    learned = make_result(training={"--emoe-k-schedule": "stratified", "--emoe-budget-scales": ""})
    text = "\n".join(serving_lines(learned, k))
    assert "do not serve learned scales: the loss above is not theirs" in text and "--hf-overrides" not in text
    assert f"set_active_experts(model, {k})" in text
    assert any("--hf-overrides" in line for line in serving_lines(learned, learned.k_train))


def test_a_k_is_measured_again_by_the_sweep_s_own_command_into_a_new_file():
    result = make_result(tail_scale={"6": 0.25, "8": 0.1})
    start = "torchrun --nproc-per-node 4 tools/sweep_k.py --load 'runs/my model' --expert-model-parallel-size 2"
    layout = "--pipeline-model-parallel-size=2 --data-path held-out"
    tail = "--emoe-tail-scale 6:0.25 8:0.1"
    assert held_out_command(result, 6) == f"{start} {layout} --k 6 {tail} --out k6.json"
    assert held_out_command(result, (2, 6)) == f"{start} {layout} --k-per-layer 2,6 {tail} --out k2-6.json"
    assert f"  {held_out_command(result, 6)}" in serving_lines(result, 6)
    one_number = make_result(tail_scale={"0": 0.2})
    assert "--k 8 --emoe-tail-scale 0.2 --out" in held_out_command(one_number, 8)
    given = make_result(tail_scale={"0": 0.2}, command="sweep_k.py --load a --emoe-tail-scale 0.2 --k 4")
    assert held_out_command(given, 8).endswith("sweep_k.py --load a --emoe-tail-scale 0.2 --k 8 --out k8.json")


def past_sweeps(folder: Path) -> list[SweepResult]:
    """What may stand in a sweep file of the tiny model (8 experts, k = 2, two MoE layers), cells or not."""
    (folder / "layout.args").write_text("--expert-model-parallel-size 2\n")
    load = f"python -u tools/sweep_k.py --load {folder / 'megatron'}"
    rest = f"--data-path {folder / 'data'} --seq-length 16 --moe-token-dispatcher-type alltoall"
    make = partial(make_result, num_experts=8, k_train=2, num_moe_layers=2, checkpoint=str(folder / "megatron"))
    lists, data = [sweep_results.make_cell((2, 4), 2.0)], SweepData(path=(str(folder / "data"),), tokens=65536)
    return [
        make(command=f"{load} --k 1 2 4 --out s.json {rest}", tail_scale={"4": 0.5, "8": 0.25}),
        make(command=f"{load} {rest} --k 4 --layer-sensitivity --emoe-tail-scale 0.2", tail_scale={"0": 0.2}),
        make(command=f"{load} --k-per-layer 2,4 --out s.json @{folder / 'layout.args'} {rest}", cells=lists),
        make(command="by hand", data=data),
        make(command="by hand", data=data, framework="transformers", checkpoint=str(folder / "hf")),
    ]


def printed_commands(result: SweepResult) -> list[str]:
    """Every command of a tool that is printed about a sweep."""
    served = [line.strip() for k in (2, 8, (2, 4)) for line in serving_lines(result, k)]
    asked = [
        sweep_command(result, Path("new.json"), [(1, 3)]),
        sweep_command(result, Path("new.json"), more="--layer-sensitivity"),
    ]
    return [*asked, *(line for line in served if "tools/sweep_k.py" in line or "pretrain_emoe.py" in line)]


def prepare(folder: Path) -> None:
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save("qwen2_moe", folder / "hf"), folder / "megatron", report=lambda _line: None)
    sweeps.write_tokens(folder / "data", documents=80)  # more than the 4096 positions of the model


def check_only(folder: Path, commands: list[str]) -> dict[str, Answer]:
    """How the tool ends on each command where nothing is left to measure after its checks."""
    from megatron_emoe.sweep import on_megatron as sweep_run
    from megatron_emoe.sweep import on_transformers as sweep_hf

    sweep_run.run_sweep = sweep_hf.run_sweep_hf = lambda _args, result: result
    os.chdir(folder)
    return {command: sweeps.run_tool("sweep_k", *shlex.split(command.split("sweep_k.py ")[1])) for command in commands}


@pytest.mark.slow
def test_the_tool_takes_every_printed_command(tmp_path):
    """Its own parser and all its checks, on as many ranks as the command has."""
    run_ranks(prepare, 1, tmp_path)
    by_ranks: dict[int, list[str]] = {1: [], 2: []}
    for result in past_sweeps(tmp_path):
        for command in printed_commands(result):
            started = re.fullmatch(r"(python|torchrun --nproc-per-node (\d)) tools/sweep_k.py .*", command)
            assert started is not None, command
            by_ranks[int(started[2] or 1)].append(command)
    assert {ranks: len(commands) for ranks, commands in by_ranks.items()} == {1: 17, 2: 5}
    for ranks, commands in by_ranks.items():
        for answers in run_ranks(check_only, ranks, tmp_path, commands):
            refused = {command: answer.err for command, answer in answers.items() if answer.status is not None}
            assert refused == {}


def prepare_and_sweep(folder: Path) -> Answer:
    """A tiny model (k = 2, two MoE layers) with its first sweep."""
    prepare(folder)
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

    assert (now.dtype, now.selection, now.combine) == ("float32", "topk", "model")
    (answer,) = run_ranks(sweeps.run_tool, 1, "sweep_k", *shlex.split(words), "--bf16")
    assert answer.status == 2
    assert "moved.json: dtype: 'float32'; must equal this run's 'bfloat16', or write to another file" in answer.err
