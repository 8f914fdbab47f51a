"""README.md's commands, and those of docs/checkpoints.md, run as printed: on a tiny model of that name, in host mode.

The working folder stands for a clone: what README.md names is linked into it, `.venv/bin` has the tests' interpreter
(tests/programs), and a `vllm` that only takes notes. Nothing is scaled: the commands for a CPU are run; of those for a
node of eight GPUs the plan, and with it the check of the training command that follows.
"""

import json
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests import programs

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()
TINY = re.search(r"`(python examples/demo_convert\.py --only-model \S+)`", README)
SECTION = README.split("## Continue-train a model\n")[1].split("## What is where")[0]
BLOCKS = re.findall(r"```bash\n(.*?)```", SECTION, re.DOTALL)
CONVERSIONS = re.findall(r"```bash\n(.*?)```", (REPO / "docs/checkpoints.md").read_text(), re.DOTALL)
TEXT = ("json", "logging", "asyncio")
"""Packages of Python's library whose sources are the text to train on."""


def clone(folder: Path) -> Path:
    """What stands for a clone of the repository that is set up, with text."""
    for name in ("tools", "examples", "slurm", "pretrain_emoe.py"):
        (folder / name).symlink_to(REPO / name)
    programs_folder = folder / ".venv" / "bin"
    programs_folder.mkdir(parents=True)
    stand_ins = {"python": f'exec {programs.python()} "$@"', "torchrun": 'exec python -m torch.distributed.run "$@"'}
    stand_ins["vllm"] = f'printf "%s\\n" "$@" >{folder}/served'
    for name, script in stand_ins.items():
        (programs_folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs_folder / name).chmod(0o755)
    (programs_folder / "activate").write_text(f"export PATH={programs_folder}:$PATH OMP_NUM_THREADS=1\n")
    for name in TEXT:
        shutil.copytree(Path(sysconfig.get_paths()["stdlib"]) / name, folder / "TEXT" / name)
    return folder


def run(folder: Path, *blocks: str) -> subprocess.CompletedProcess:
    """The blocks in one shell that ends at the first command that fails."""
    script = "set -e\n" + "\n".join(blocks)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
    return done


def test_the_commands_run_as_they_are_printed(tmp_path):
    prepare, node, cpu, train, one_gpu, tasks, serve = BLOCKS
    folder = clone(tmp_path)
    assert TINY is not None and "--gpus $GPUS" in node and "cpu.args" in cpu and one_gpu.startswith("BASE=CHECKPOINT ")
    activate, *rest = prepare.splitlines()
    assert activate == "source .venv/bin/activate"
    run(folder, activate, TINY[1], *rest, node, f"{checked(train)}\n")
    assert "--use-distributed-optimizer" in (folder / "layout.args").read_text() and not (folder / "OUT").exists()
    done = run(folder, activate, cpu, train, tasks, serve)
    assert "iteration       10/      10" in done.stdout and "validation loss at iteration 10" in done.stdout
    assert (folder / "OUT/latest_checkpointed_iteration.txt").read_text() == "10"
    check_results(folder, done.stdout)
    convert, with_sweep, serve, grow = CONVERSIONS
    done = run(folder, activate, "rm -r CHECKPOINT EXPORTED", convert, "rm -r EXPORTED", with_sweep, serve, grow)
    assert "fp32: the same model" in done.stdout and "EXPORTED: Hugging Face model (safetensors)" in done.stdout
    assert "another model than before: noise of 0.01 on the copies" in done.stdout
    assert json.loads((folder / "EXPORTED/config.json").read_text())["emoe"]["evaluated_k"] == [4, 6, 8, 12, 16, 24]


def checked(train: str) -> str:
    """The check of the printed training command as a job of eight ranks, in host mode."""
    command = train.replace("\\\n", " ").splitlines()[0]
    flags = command.partition("pretrain_emoe.py ")[2]
    return f"python tools/check_job.py --nodes 1 --processes 8 --gpus 0 --save OUT -- {flags}"


def check_results(folder: Path, said: str) -> None:
    """What the commands leave, and that the sweep read nothing that the tail scale was fitted on."""
    for name in ("curve.png", "card.html", "card.md"):
        assert (folder / name).stat().st_size > 1000
    before, after = (json.loads((folder / name).read_text()) for name in ("before.json", "sweep.json"))
    assert before["data"]["digest"] == after["data"]["digest"]
    (table,) = (folder / "OUT").glob("*/emoe_tail_scale.json")
    fitted = json.loads(table.read_text())
    assert set(fitted["tail_scale"]) == {"12", "16", "24"} and fitted["tokens_before"] == 4096 // 2
    assert "fitted on" not in " ".join(line for line in said.splitlines() if "sweep_k" in line)
    assert json.loads((folder / "EXPORTED/config.json").read_text())["num_experts_per_tok"] == 8
    assert json.loads((folder / "tasks.json").read_text())
    served = (folder / "served").read_text().splitlines()
    assert served == ["serve", "EXPORTED", "--additional-config", '{"emoe": {"k": 12}}']
