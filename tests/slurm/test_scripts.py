"""The scripts in slurm/ where there is no Slurm: what they print, what they refuse, and what sbatch is given.

sbatch is a stand-in that writes down its words; the planner and the check are the real ones where a test is about them.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests import programs
from tests.sweep_results import make_result
from tests.tiny import flags

REPO = Path(__file__).resolve().parents[2]
MODELS = {"emoe_7b.sh": "olmoe-7b", "emoe_14b.sh": "qwen1.5-moe-14b", "emoe_16b.sh": "deepseek-v2-lite-16b"}
MODELS |= {"emoe_21b.sh": "ernie-4.5-21b", "emoe_moonlight.sh": "moonlight-16b"}
MODELS |= {"emoe_lora_7b.sh": "llama2-7b-lora"}
MODELS |= {"emoe_30b.sh": "qwen3-30b", "emoe_47b.sh": "mixtral-47b", "emoe_1b.sh": "granite-1b"}


class Site:
    """A machine with a cluster.env, a layout that needs no planner, and an sbatch that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, folder / "asked"
        for name in ("bin", "base", "elsewhere"):
            (folder / name).mkdir()
        sbatch = folder / "bin" / "sbatch"
        sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{self.asked}\n')
        sbatch.chmod(0o755)
        self.settings = {
            "EMOE_ACCOUNT": "physics",
            "EMOE_PARTITION": "gpu",
            "EMOE_SAVE": str(folder / "save"),
            "EMOE_BASE": str(folder / "base"),
            "EMOE_DATA": "0.3 a 0.7 b",
            "EMOE_LAYOUT": "--expert-model-parallel-size 8 --micro-batch-size 1",
            "EMOE_PYTHON": programs.python(),
            "EMOE_CHECK_PYTHON": "none",
        }

    def run(self, script: str, *words: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
        path = self.folder / "cluster.env"
        path.write_text("".join(f': "${{{name}={value}}}"\n' for name, value in self.settings.items()))
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EMOE_"))}
        known |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "EMOE_CLUSTER_ENV": str(path)}
        command = ["bash", str(REPO / "slurm" / script), *words]
        done = subprocess.run(command, env=known | env, capture_output=True, text=True, cwd=cwd or REPO, timeout=300)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def submitted(self) -> list[str] | None:
        return self.asked.read_text().splitlines() if self.asked.exists() else None


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize("script", MODELS)
def test_every_script_submits_itself_with_the_settings_of_the_site_and_passes_flags_on(script, site):
    done = site.run(script, "--time=1:00:00", "-N4", "--", "--lr", "1e-5", cwd=site.folder / "elsewhere")
    assert done.returncode == 0, done.stderr
    own = ["--gpus-per-node=8", "--account=physics", "--partition=gpu", "--time=1:00:00", "-N4", "--nodes=4"]
    assert site.submitted() == [*own, "--export=ALL", str(REPO / "slurm" / script), "--", "--lr", "1e-5"]


@pytest.mark.parametrize("script", MODELS)
def test_what_sbatch_reads_from_the_script_makes_the_job_survive(script):
    text = (REPO / "slurm" / script).read_text()
    for option in (
        "--requeue",
        "--signal=B:USR1@180",
        "--open-mode=append",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
    ):
        assert f"#SBATCH {option}\n" in text
    assert f"EMOE_MODEL={MODELS[script]}\n" in text


def test_dry_run_prints_the_command_line_and_submits_nothing(site):
    site.settings["EMOE_CHECK_PYTHON"] = "none"
    done = site.run("emoe_21b.sh", "--dry-run", "--", "--lr", "1e-5")
    assert done.returncode == 0 and site.submitted() is None
    line = done.stdout.rstrip().splitlines()[-1].split()
    assert line[:7] == "pretrain_emoe.py --data-path 0.3 a 0.7 b".split() + [
        f"@{REPO}/examples/models/ernie4_5_21b_a3b.args"
    ]
    save = str(site.folder / "save")
    start = ["--pretrained-checkpoint", str(site.folder / "base"), "--load", save, "--save", save]
    assert line[-9:] == [*start, "--exit-signal-handler", "--lr", "1e-5"]


def test_the_flags_of_an_imported_checkpoint_come_from_its_own_file(site):
    (site.folder / "base" / "model.args").write_text("--num-layers 2\n")
    assert f"@{site.folder}/base/model.args" in site.run("emoe_7b.sh", "--dry-run").stdout


@pytest.mark.slow
def test_dry_run_needs_no_cluster_env_and_shows_the_planner_s_layout(site, tmp_path):
    nowhere = {"EMOE_CLUSTER_ENV": str(tmp_path / "none"), "EMOE_PYTHON": programs.python()}
    done = site.run("emoe_7b.sh", "--dry-run", "--nodes", "2", **nowhere)
    assert done.returncode == 0, done.stderr
    assert "olmoe-7b on 16 GPUs" in done.stdout and "k_max = 24 of 64" in done.stdout
    flags_line = next(line for line in done.stdout.splitlines() if line.startswith("flags: "))
    assert flags_line.removeprefix("flags: ").strip() in done.stdout.rstrip().splitlines()[-1]
    assert "these are the values of cluster.env.example" in done.stderr


def test_dry_run_where_nothing_is_set_up_shows_the_command_without_a_plan(site, tmp_path):
    nowhere = {"EMOE_CLUSTER_ENV": str(tmp_path / "none"), "EMOE_PYTHON": "/no/python"}
    done = site.run("emoe_7b.sh", "--dry-run", **nowhere)
    assert done.returncode == 0 and "pretrain_emoe.py --data-path" in done.stdout
    assert "EMOE_CHECK_PYTHON /no/python: no such program, so no plan and no layout below" in done.stderr
    del site.settings["EMOE_LAYOUT"], site.settings["EMOE_CHECK_PYTHON"]
    site.settings |= {"EMOE_PYTHON": "/no/python", "EMOE_CONTAINER": "image"}  # whose interpreter nobody looks for here
    done = site.run("emoe_7b.sh")
    assert done.returncode == 2 and "EMOE_CHECK_PYTHON /no/python: no such program" in done.stderr


@pytest.mark.slow
def test_the_planner_s_refusal_ends_the_submission(site):
    del site.settings["EMOE_LAYOUT"]
    site.settings |= {"EMOE_GPU_MEMORY": "10", "EMOE_CHECK_PYTHON": programs.python()}
    done = site.run("emoe_7b.sh")
    assert done.returncode == 2 and site.submitted() is None
    assert "no layout fits 8 GPUs" in done.stderr and "no layout for olmoe-7b on 1 x 8 GPUs of 10 GB" in done.stderr


REFUSED = [
    ({"EMOE_ACCOUNT": ""}, (), "EMOE_ACCOUNT is not set: give it in"),
    ({"EMOE_SAVE": ""}, (), "EMOE_SAVE is not set"),
    ({"EMOE_BASE": "/no/such"}, (), "EMOE_BASE /no/such: no such folder"),
    ({"EMOE_PYTHON": "/no/python"}, (), "EMOE_PYTHON /no/python: no such program"),
    ({"EMOE_STAGE": "/no/stage.sh"}, (), "EMOE_STAGE /no/stage.sh: no such file"),
    ({"EMOE_CONTAINER_KIND": "docker"}, (), "EMOE_CONTAINER_KIND docker: must be pyxis or apptainer"),
    ({"EMOE_GPUS_PER_NODE": "many"}, (), "EMOE_GPUS_PER_NODE many: must be a whole number of at least 0"),
    ({"EMOE_PROCS_PER_NODE": "16"}, (), "EMOE_PROCS_PER_NODE 16: at most one process for each"),
    ({}, ("--nodes=2-4",), "--nodes 2-4: must be one number"),
    ({"EMOE_LAYOUT": ""}, (), "EMOE_CHECK_PYTHON none: the planner cannot run; give the layout in EMOE_LAYOUT"),
]


@pytest.mark.parametrize(("settings", "options", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_wrong_settings_are_refused_before_submission(settings, options, told, site):
    site.settings |= settings
    done = site.run("emoe_21b.sh", *options)
    assert done.returncode == 2 and site.submitted() is None
    assert done.stderr.startswith(f"emoe_21b.sh: error: {told}")


def test_a_missing_cluster_env_is_refused_with_the_way_to_one(site):
    done = site.run("emoe_21b.sh", EMOE_CLUSTER_ENV="/no/cluster.env")
    assert done.returncode == 2 and site.submitted() is None
    assert "EMOE_CLUSTER_ENV /no/cluster.env: no such file; copy" in done.stderr


def test_a_dry_run_is_refused_by_the_same_rules(site):
    site.settings["EMOE_PROCS_PER_NODE"] = "many"
    done = site.run("emoe_21b.sh", "--dry-run")
    assert done.returncode == 2
    assert done.stderr.startswith("emoe_21b.sh: error: EMOE_PROCS_PER_NODE many: must be a whole number")


def test_settings_may_have_several_lines_and_folders_with_spaces(site):
    spaced = site.folder / "two words"
    spaced.mkdir()
    (spaced / "model.args").write_text("--num-layers 2\n")
    env = {"EMOE_BASE": str(spaced), "EMOE_TRAIN_FLAGS": "--lr 1e-5\n--train-iters 7", "EMOE_RECIPE": ""}
    done = site.run("emoe_21b.sh", "--dry-run", **env)
    words = shlex.split(done.stdout.rstrip().splitlines()[-1])
    assert f"@{spaced}/model.args" in words and str(spaced) in words
    assert words[words.index("--lr") :][:4] == ["--lr", "1e-5", "--train-iters", "7"]


@pytest.mark.slow
def test_the_planner_plans_what_will_run(site):
    """The model of EMOE_BASE, the recipe's words, and what the training flags and those after -- say."""
    del site.settings["EMOE_LAYOUT"]
    site.settings |= {"EMOE_CHECK_PYTHON": programs.python()}
    text = (REPO / "examples/models/olmoe_1b_7b.args").read_text()
    model = site.folder / "base" / "model.args"
    model.write_text(text.replace("--max-position-embeddings 4096", "--max-position-embeddings 2048"))
    recipe = f"@{REPO}/examples/recipe.args --emoe-k-grid 4 16"
    own = ("--train-iters", "70", "--micro-batch-size", "2")
    done = site.run("emoe_7b.sh", "--dry-run", "--", *own, EMOE_RECIPE=recipe)
    assert "k_max = 16 of 64" in done.stdout, done.stderr
    assert (
        f"{model} on 8 GPUs" in done.stdout and "256 sequences of 2048 tokens a step; micro-batches of 2" in done.stdout
    )
    assert ": 70 steps, " in done.stdout and "--seq-length 2048 " in done.stdout.rstrip().splitlines()[-1]


def test_a_cluster_env_whose_last_test_does_not_hold_is_fine_and_one_that_bash_cannot_read_is_refused(site):
    path = site.folder / "own.env"
    text = "".join(f': "${{{name}={value}}}"\n' for name, value in site.settings.items())
    path.write_text(text + '[ -n "${NO_SUCH:-}" ] && export NO_SUCH\n')
    assert site.run("emoe_21b.sh", "--dry-run", EMOE_CLUSTER_ENV=str(path)).returncode == 0
    path.write_text(text + "if\n")
    done = site.run("emoe_21b.sh", "--dry-run", EMOE_CLUSTER_ENV=str(path))
    assert done.returncode == 2 and f"EMOE_CLUSTER_ENV {path}: bash cannot read it" in done.stderr


def test_a_cluster_without_gpus_is_asked_for_none(site):
    site.settings |= {"EMOE_GPUS_PER_NODE": "0", "EMOE_PROCS_PER_NODE": "2"}
    assert site.run("emoe_21b.sh").returncode == 0
    assert "--gpus-per-node=0" in (site.submitted() or [])


@pytest.mark.slow
def test_flags_are_checked_at_the_job_s_size_before_submission(site):
    job = {"EMOE_GPUS_PER_NODE": "0", "EMOE_PROCS_PER_NODE": "1", "EMOE_RECIPE": "", "EMOE_TRAIN_FLAGS": ""}
    (site.folder / "tiny.args").write_text("\n".join(flags(save_interval=2)))
    job |= {"EMOE_MODEL_FLAGS": f"@{site.folder}/tiny.args", "EMOE_BASE": "none", "EMOE_DATA": "none"}
    site.settings |= job | {
        "EMOE_CHECK_PYTHON": programs.python(),
        "EMOE_LAYOUT": "--tensor-model-parallel-size 2 --sequence-parallel",
    }
    done = site.run("emoe_21b.sh", "--nodes=3")
    assert done.returncode == 2 and site.submitted() is None
    assert "check_job.py: error: --tensor-model-parallel-size 2: needs a multiple of 2 ranks, here are 3" in done.stderr


def test_the_script_finds_the_repository_from_slurm_s_copy(site, tmp_path):
    """Under sbatch the script runs from the spool; outside the repository and without EMOE_HOME it says what to do."""
    copy = tmp_path / "slurm_script"
    copy.write_text((REPO / "slurm" / "emoe_21b.sh").read_text())
    env = {"PATH": os.environ["PATH"], "EMOE_CLUSTER_ENV": "/no/cluster.env"}
    lost = subprocess.run(["bash", copy], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert lost.returncode == 2 and "set EMOE_HOME" in lost.stderr
    for known in ({"EMOE_HOME": str(REPO)}, {"SLURM_SUBMIT_DIR": str(REPO)}, {"SLURM_SUBMIT_DIR": f"{REPO}/slurm"}):
        found = subprocess.run(["bash", copy], env=env | known, capture_output=True, text=True, cwd=tmp_path)
        assert "EMOE_CLUSTER_ENV /no/cluster.env: no such file" in found.stderr


def test_the_example_settings_are_read_by_bash_and_have_every_name():
    example = (REPO / "slurm" / "cluster.env.example").read_text()
    code = "".join((REPO / "slurm" / name).read_text() for name in ("settings.sh", "job.sh", "node.sh"))
    defaults = code[code.index("default_settings()") : code.index("demand()")]
    settings = set(re.findall(r"EMOE_[A-Z_]+(?=:?=)", defaults)) - {"EMOE_REMIND_SECONDS"}  # for the tests' sake
    assert len(settings) > 10 and [name for name in settings if name not in example] == []
    done = subprocess.run(["bash", "-euc", f"EMOE_MODEL=m; {example}\necho $EMOE_SAVE"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "/shared/runs/m\n"), done.stderr


def test_a_sweep_is_an_array_with_one_k_a_task(site):
    (site.folder / "run").mkdir()
    (site.folder / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    asked = {"EMOE_SWEEP_LOAD": str(site.folder / "run"), "EMOE_SWEEP_K": "4 8 24", "EMOE_SWEEP_OUT": "sweep.json"}
    shown = site.run("sweep.sh", "--dry-run", "--", "--data-path", "held", **asked).stdout
    assert "--k 8 --out sweep.k8.json --data-path held" in shown and site.submitted() is None
    assert site.run("sweep.sh", "--", "--data-path", "held", **asked).returncode == 0
    assert "--array=0-2" in (site.submitted() or [])


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("EMOE_SWEEP_K", "4 all", "all is no number of experts"),
        ("EMOE_SWEEP_K", "4 8 4", "4 is given twice"),
        ("EMOE_SWEEP_OUT", "/no/such/sweep.json", "its folder is not there, or cannot be written"),
        ("EMOE_SWEEP_OUT", "sweep.csv", "must end in .json"),
        ("EMOE_CONTAINER", "image.sif", "sweep.sh runs without one"),
        ("EMOE_PROCS_PER_NODE", "many", "must be a whole number of at least 1"),
        ("EMOE_PYTHON", "/no/python", "no such program"),
    ],
)
def test_a_wrong_sweep_is_refused_before_submission(name, value, rule, site):
    (site.folder / "run").mkdir()
    (site.folder / "run" / "latest_checkpointed_iteration.txt").write_text("4")
    asked = {"EMOE_SWEEP_LOAD": str(site.folder / "run"), "EMOE_SWEEP_K": "4 8", "EMOE_SWEEP_OUT": "sweep.json"}
    site.settings.pop(name, None)
    done = site.run("sweep.sh", cwd=site.folder, **asked | {name: value})
    assert done.returncode == 2 and site.submitted() is None
    assert f"sweep.sh: error: {name} {value}: {rule}" in done.stderr


def test_the_parts_of_a_sweep_are_joined_in_order_of_k(tmp_path):
    from megatron_emoe.sweep.result import load, save

    for k, loss in {8: 2.5, 4: 2.0, 16: 3.0}.items():
        save(make_result("run", {k: loss}), tmp_path / f"sweep.k{k}.json")
    parts = sorted(map(str, tmp_path.glob("sweep.k*.json")))
    tool = [programs.python(), str(REPO / "tools" / "join_sweeps.py")]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run([*tool, *parts, "--out", tmp_path / "all.json"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [(cell.k, cell.loss) for cell in load(tmp_path / "all.json").cells] == [(4, 2.0), (8, 2.5), (16, 3.0)]
    save(make_result("other", {12: 2.2}), tmp_path / "other.json")
    mixed = [*tool, parts[0], tmp_path / "other.json", "--out", tmp_path / "mixed.json"]
    wrong = subprocess.run(mixed, env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and "checkpoint" in wrong.stderr and not (tmp_path / "mixed.json").exists()


@pytest.mark.parametrize(
    "script", [*(f"slurm/{name}" for name in MODELS), "slurm/sweep.sh", "examples/continue_olmoe_1gpu.sh"]
)
def test_another_shell_is_told_to_be_bash(script):
    done = subprocess.run(["sh", script, "--dry-run"], cwd=REPO, capture_output=True, text=True)
    said = f"{Path(script).name}: error: run it with bash, not sh\n"
    assert (done.returncode, done.stderr) == (2, said) or os.path.realpath("/bin/sh").endswith("bash")
