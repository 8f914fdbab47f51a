"""A sweep as a job array on a real Slurm: the joined result is that of one sweep over all k'."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_emoe.sweep.result import load
from tests.distributed import torchrun
from tests.slurm.jobs import SCRIPT, TinyJob, slurm, until, write_settings
from tests.sweeps import flags, write_tokens

pytestmark = pytest.mark.slurm
KS = (2, 3, 5)


def test_a_sweep_array_measures_what_one_sweep_does(whole: TinyJob, tmp_path: Path):
    words = ["--load", str(whole.save), *flags(write_tokens(tmp_path / "held", vocabulary=96), None)]
    out = tmp_path / "sweep.json"
    settings = {
        "EMOE_CLUSTER_ENV": str(write_settings(tmp_path)),
        "EMOE_SWEEP_LOAD": str(whole.save),
        "EMOE_SWEEP_K": " ".join(map(str, KS)),
        "EMOE_SWEEP_OUT": str(out),
    }
    command = [SCRIPT.with_name("sweep.sh"), f"--output={tmp_path}/%a.out", "--", *words[2:]]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split()[-1]
    until(lambda: not slurm("squeue", "-h", "-j", number, "-o", "%A"), 300, f"end of array {number}")
    logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("*.out"))
    assert out.exists(), logs

    whole_sweep = tmp_path / "one.json"
    torchrun(1, "tools/sweep_k.py", *words, "--k", *map(str, KS), "--out", str(whole_sweep))
    joined, one = load(out), load(whole_sweep)
    assert [cell.k for cell in joined.cells] == list(KS), logs
    assert [cell.loss for cell in joined.cells] == [cell.loss for cell in one.cells]
    assert joined.data.digest == one.data.digest and joined.data.digest is not None
