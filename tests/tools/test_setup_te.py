"""tools/setup_te.sh up to pip's work: what it refuses, what it asks pip for, and that a second call does nothing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "setup_te.sh"

# Stands for the interpreter of an environment: says which torch it has, and writes down what pip is asked for.
FAKE_PYTHON = """#!/bin/bash
case "$*" in
  *torch.version.cuda*) echo "2.15.0 {cuda} {site}" ;;
  "-m pip"*) echo "$* | CPATH=$CPATH PYTHONPATH=$PYTHONPATH" >>{log}; exit {pip_status} ;;
  "-c import transformer_engine.pytorch") exit {import_status} ;;
esac
"""


class Machine:
    """A folder with a fake environment in which the script runs."""

    def __init__(self, folder: Path, cuda: str = "13.2", pip_status: int = 0, import_status: int = 0) -> None:
        self.te, self.log, self.site = folder / "te", folder / "pip.log", folder / "site"
        python = folder / "venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        settings = {"cuda": cuda, "pip_status": pip_status, "import_status": import_status}
        python.write_text(FAKE_PYTHON.format(site=self.site, log=self.log, **settings))
        python.chmod(0o755)
        self.env = {"VENV": str(folder / "venv"), "TE": str(self.te), "PATH": os.environ["PATH"]}

    def run(self, **env: str) -> tuple[int, str]:
        done = subprocess.run(["bash", str(SCRIPT)], env=self.env | env, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def pip(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


def test_it_installs_into_its_own_folder_and_a_second_call_does_nothing(tmp_path):
    machine = Machine(tmp_path)
    status, said = machine.run()
    assert status == 0 and "done in" in said
    first, second = machine.pip()
    for call in (first, second):
        assert f"--no-deps --target {machine.te} " in call
    assert "nvidia-cuda-crt==13.2.*" in first and "onnxscript==" in first
    assert "--no-build-isolation transformer-engine==2.20.2 transformer-engine-cu13==2.20.2" in second
    headers = [f"{machine.site}/nvidia/{name}/include" for name in ("nccl", "cudnn", "cu13")]
    assert f"CPATH={':'.join([*headers, f'{machine.te}/nvidia/cu13/include'])} PYTHONPATH={machine.te}" in second
    assert machine.run() == (0, "")
    assert len(machine.pip()) == 2


def test_env_sh_names_the_folder_and_the_libraries(tmp_path):
    machine = Machine(tmp_path)
    machine.run()
    show = f'source {machine.te}/env.sh && echo "$PYTHONPATH" && echo "$LD_LIBRARY_PATH" && echo "$CURAND_HOME"'
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": "/mine"}
    lines = subprocess.run(["bash", "-c", show], env=env, capture_output=True, text=True).stdout.splitlines()
    assert lines[0] == f"{machine.te}:/mine"
    assert lines[1].split(":")[-2:] == [f"{machine.site}/nvidia/cu13/lib", f"{machine.te}/nvidia/cu13/lib"]
    assert lines[2] == f"{machine.te}/nvidia/cu13"


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"cuda": "none"}, "is built for CUDA none, it must be 13"),
        ({"cuda": "12.9"}, "is built for CUDA 12.9, it must be 13"),
    ],
)
def test_another_torch_is_refused_before_anything_is_written(tmp_path, machine, message):
    machine = Machine(tmp_path, **machine)
    status, said = machine.run()
    assert status == 1 and message in said
    assert not machine.te.exists() and machine.pip() == []


def test_no_environment(tmp_path):
    status, said = Machine(tmp_path).run(VENV=str(tmp_path / "elsewhere"))
    assert status == 1 and f"there is no {tmp_path}/elsewhere/bin/python: make the environment first" in said


def test_no_compiler(tmp_path):
    machine, tools = Machine(tmp_path), tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "realpath", "cat", "awk"):
        (tools / name).symlink_to(shutil.which(name))
    status, said = machine.run(PATH=str(tools))
    assert status == 1 and "there is no g++" in said and machine.pip() == []


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    machine = Machine(tmp_path)
    machine.te.mkdir()
    (machine.te / "thesis.txt").write_text("finished")
    status, said = machine.run()
    assert status == 1 and "not made by this" in said
    assert (machine.te / "thesis.txt").read_text() == "finished"


@pytest.mark.parametrize("fault", ["pip_status", "import_status"])
def test_after_a_failure_the_next_call_starts_over(tmp_path, fault):
    machine = Machine(tmp_path / "broken", **{fault: 1})
    status, _ = machine.run()
    assert status == 1
    tried = len(machine.pip())
    status, said = machine.run()
    assert status == 1 and "20 to 40 minutes" in said and len(machine.pip()) == 2 * tried
