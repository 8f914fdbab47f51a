"""A run that goes on with other settings: told, or refused with both values, before anything is built.

What is refused is what Megatron-Core itself ends with, or ignores: the first tests show that, on its own optimizer.
"""

import contextlib
import io
import shutil
import sys
from pathlib import Path

import pytest

from tests import sweeps, tiny
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow

RUN = {"train_iters": 4, "save_interval": 2, "exit_interval": 2}
KEEP = "keep the stored value, or go on from the weights alone with --no-load-optim"
SCHEDULE = "give --override-opt-param-scheduler for the new one"
TOLD = "which take effect: "
OVERRIDE = {"override_opt_param_scheduler": True}
STORED = {"use_checkpoint_opt_param_scheduler": True}

REFUSED = {
    "lr": ({"lr": 1e-3}, "--lr: stored 0.005, now 0.001", KEEP),
    "lr, although the schedule may change": ({"lr": 1e-3} | OVERRIDE, "--lr: stored 0.005, now 0.001", KEEP),
    "beta": ({"adam_beta2": 0.5}, "--adam-beta2: stored 0.999, now 0.5", KEEP),
    "eps": ({"adam_eps": 1e-3}, "--adam-eps: stored 1e-08, now 0.001", KEEP),
    "optimizer": ({"optimizer": "sgd"}, "--optimizer: stored adam, now sgd", KEEP),
    "precision": ({"bf16": True}, "--bf16: stored False, now True", KEEP),
    "shards": ({"use_distributed_optimizer": True}, "--use-distributed-optimizer: stored False, now True", KEEP),
    "length": ({"train_iters": 8}, "--lr-decay-iters, -samples, or the run's length): stored 32, now 64", SCHEDULE),
    "weight decay": ({"weight_decay": 0.5}, "--weight-decay: stored 0.01, now 0.5", SCHEDULE),
    "warm-up": ({"lr_warmup_iters": 1}, "-samples, -fraction): stored 0, now 8", SCHEDULE),
    "style": ({"lr_decay_style": "cosine"}, "--lr-decay-style: stored constant, now cosine", SCHEDULE),
    "nothing to use": ({"no_load_optim": True} | STORED, "excludes --no-load-optim", "the stored schedule is not read"),
}
GOES_ON = {
    "the same": ({}, None),
    "longer": ({"train_iters": 8} | OVERRIDE, "(--train-iters, --train-samples): stored 32, now 64"),
    "longer, on the stored schedule": ({"train_iters": 8} | STORED, "the stored schedule stays, as --use-checkpoint"),
    "seed": ({"seed": 11}, f"{TOLD}--seed: stored 7, now 11"),
    "split": ({"split": "80,10,10"}, f"{TOLD}--split: stored 90,5,5, now 80,10,10"),
    "clipping": ({"clip_grad": 0.1}, f"{TOLD}--clip-grad: stored 1.0, now 0.1"),
    "length of sequences": ({"seq_length": 8}, f"{TOLD}--seq-length: stored 16, now 8"),
    "lr of a new optimizer": ({"lr": 1e-3, "no_load_optim": True}, None),
    "new run": ({"lr": 1e-3, "finetune": True, "save": None}, None),
}


def asked(folder: Path, change: dict) -> tuple[int, str]:
    """Exit status, 0 where the arguments pass, and what was said."""
    from megatron_emoe.host import mode as host_mode
    from megatron_emoe.training.arguments import parse

    words = tiny.flags(**RUN | {"load": folder, "save": folder} | change)
    sys.argv = ["pretrain_emoe.py", *host_mode.setup(words)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            parse()
            status = 0
        except SystemExit as leaving:
            status = leaving.code
        finally:
            sweeps._forget()
    return status, out.getvalue()


def session(folder: Path) -> dict[str, tuple[int, str]]:
    return {name: asked(folder, case[0]) for name, case in (REFUSED | GOES_ON).items()}


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    run_ranks(tiny.train, 1, tiny.flags(**RUN, save=folder))
    return folder


@pytest.fixture(scope="module")
def answers(stored) -> dict[str, tuple[int, str]]:
    return run_ranks(session, 1, stored)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_could_not_be_loaded_is_refused(name, answers):
    _, *told = REFUSED[name]
    status, said = answers[name]
    assert status == 2 and len([line for line in said.splitlines() if "error:" in line]) == 1, said[-500:]
    for words in told:
        assert words in said


@pytest.mark.parametrize("name", GOES_ON)
def test_what_takes_effect_is_told_in_one_line(name, answers):
    _, told = GOES_ON[name]
    status, said = answers[name]
    assert status == 0, said[-500:]
    lines = [line for line in said.splitlines() if ": stored " in line]
    assert len(lines) == (told is not None), lines
    assert told is None or told in lines[0]


def unchecked(folder: Path, change: dict) -> list[tuple]:
    """Go on without this check; the groups of the optimizer after the run: betas, eps."""
    import gc

    from megatron.core.optimizer.optimizer import MegatronOptimizer

    from megatron_emoe.model import checkpoint

    checkpoint.check_going_on = lambda *_: None
    tiny.train(tiny.flags(**RUN | {"load": folder, "save": folder, "exit_interval": None} | change))
    found = [one for one in gc.get_objects() if isinstance(one, MegatronOptimizer)]
    return [(group["betas"], group["eps"]) for group in found[0].param_groups]


def test_the_core_ignores_the_betas_that_are_asked_for(stored, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "copy")
    groups = run_ranks(unchecked, 1, folder, {"adam_beta2": 0.5, "adam_eps": 1e-3})[0]
    assert set(groups) == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize("name", ["lr, although the schedule may change", "weight decay"])
def test_the_core_ends_with_an_exception(name, stored, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "copy")
    with pytest.raises(RuntimeError, match="Could not find parameter group|do not match"):
        run_ranks(unchecked, 1, folder, REFUSED[name][0])
