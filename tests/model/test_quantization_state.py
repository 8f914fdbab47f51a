"""Checkpoints with and without the state that layers keep beside their weights: what is there is loaded, what is not is
not asked for, and a missing weight stays an error."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch.distributed.checkpoint import FileSystemReader

from tests.distributed import run_ranks
from tests.model.test_layer_spec import model_of
from tests.tiny import flags, train

SAVE = {"save_interval": 100, "train_iters": 2, "no_save_optim": True}
FROM = {"finetune": True, "exit_on_missing_checkpoint": True, "train_iters": 2}


def keys_of(checkpoint: Path) -> set[str]:
    return set(FileSystemReader(checkpoint).read_metadata().state_dict_metadata)


def states_of(checkpoint: Path) -> set[str]:
    return {key for key in keys_of(checkpoint) if "_extra_state" in key}


def write(changes: dict[str, Any], without: str, state: Any) -> None:
    """Save a model, leaving out entries whose key has `without` in it; row-parallel layers' state is `state`."""
    from megatron.training.checkpointing import save_checkpoint

    RowParallelLinear.get_extra_state = lambda layer: state
    model = model_of(changes)
    whole = model.sharded_state_dict
    model.sharded_state_dict = lambda *args, **kwargs: {
        name: entry for name, entry in whole(*args, **kwargs).items() if without not in entry.key
    }
    with contextlib.redirect_stdout(io.StringIO()):
        save_checkpoint(1, [model], None, None, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of one model: whole, without any state, and without the router."""
    folder = tmp_path_factory.mktemp("saved")
    for name, without in (("whole", "no such key"), ("bare", "_extra_state"), ("broken", "mlp.router.weight")):
        run_ranks(write, 1, {"save": folder / name, "save_interval": 1}, without, None)
    whole, bare = (folder / name / "iter_0000001" for name in ("whole", "bare"))
    assert states_of(whole) and keys_of(bare) == keys_of(whole) - states_of(whole)
    return folder


@pytest.mark.slow
def test_training_starts_from_a_checkpoint_without_state_and_saves_all_of_it(saved, tmp_path):
    runs = []
    for name in ("whole", "bare"):
        words = flags(**SAVE | FROM, load=saved / name, save=tmp_path / name)
        runs.append(run_ranks(train, 1, words)[0])
    assert runs[0].losses and runs[0].losses == runs[1].losses
    assert "load_return" not in runs[1].log  # the core's words when its strict load has failed
    again = [states_of(tmp_path / name / "iter_0000002") for name in ("whole", "bare")]
    assert again[0] == again[1] == states_of(saved / "whole" / "iter_0000001")


@pytest.mark.slow
def test_several_ranks_and_wrapped_models_too(saved):
    layout = {"expert_model_parallel_size": 2, "bf16": True, "use_distributed_optimizer": True}
    runs = [run_ranks(train, 2, flags(**SAVE | FROM | layout, load=saved / name)) for name in ("whole", "bare")]
    assert [run.losses for run in runs[0]] == [run.losses for run in runs[1]] != [[], []]


def test_a_missing_weight_is_still_an_error(saved):
    with pytest.raises(RuntimeError, match="decoder.layers.mlp.router.weight from model not in state dict"):
        run_ranks(train, 1, flags(**FROM, load=saved / "broken"))


def read(changes: dict[str, Any], precision: str | None) -> list[Any]:
    """Load --load and return the state that each row-parallel layer was given."""
    from megatron.training.checkpointing import load_checkpoint

    given: list[Any] = []
    RowParallelLinear.get_extra_state = lambda layer: "own"
    RowParallelLinear.set_extra_state = lambda layer, state: given.append(state)
    model = model_of(changes)
    model.config.fp8 = precision  # no CPU computes in FP8, but what is asked for depends on it
    with contextlib.redirect_stdout(io.StringIO()):
        load_checkpoint([model], None, None)
    return given


@pytest.mark.slow
def test_state_that_is_there_is_loaded_by_a_model_that_uses_it(tmp_path):
    loads = {"load": tmp_path, "no_load_optim": True, "no_load_rng": True, "exit_on_missing_checkpoint": True}
    run_ranks(write, 1, {"save": tmp_path, "save_interval": 1}, "linear_proj._extra_state", "stored")
    given = run_ranks(read, 1, loads, "hybrid")[0]
    assert sorted(given) == ["own"] * 2 + ["stored"] * 16  # two layers: attention's projection, 8 experts' second one
    assert run_ranks(read, 1, loads, None)[0] == ["own"] * 18  # scales of FP8 mean nothing to bf16
