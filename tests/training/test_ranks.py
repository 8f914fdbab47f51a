"""How many ranks a layout needs, and a program that torchrun did not start."""

import os
from argparse import Namespace

import pytest

from megatron_emoe.training.ranks import ALONE, check_ranks, settle_ranks

SIZES = ("tensor_model", "pipeline_model", "context", "expert_model", "expert_tensor")


def layout(world_size: int, **sizes: int) -> Namespace:
    default = {f"{name}_parallel_size": 1 for name in SIZES} | {"expert_tensor_parallel_size": None}
    return Namespace(world_size=world_size, **default | {f"{name}_parallel_size": n for name, n in sizes.items()})


@pytest.mark.parametrize(
    ("world_size", "sizes", "message"),
    [
        (1, {}, None),
        (8, {"expert_model": 4, "pipeline_model": 2}, None),
        (4, {"tensor_model": 2, "expert_model": 2}, None),  # tensor parallelism of experts is 2 too: 4 ranks
        (2, {"tensor_model": 2, "expert_model": 2, "expert_tensor": 1}, None),  # 2 of both share 2 ranks
        (1, {"expert_model": 2}, "--expert-model-parallel-size 2: needs a multiple of 2 ranks, here is 1 process"),
        (
            6,
            {"tensor_model": 2, "pipeline_model": 2},
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2: needs a multiple of 4 ranks, here are 6",
        ),
        (2, {"tensor_model": 2, "expert_model": 2}, "needs a multiple of 4 ranks, here are 2: torchrun --nproc-per"),
    ],
)
def test_ranks_of_a_layout(world_size, sizes, message):
    if message is None:
        return check_ranks(layout(world_size, **sizes))
    with pytest.raises(ValueError) as refused:
        check_ranks(layout(world_size, **sizes))
    assert message in str(refused.value)


def test_a_process_without_torchrun_is_the_only_rank(monkeypatch):
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "1234")
    settle_ranks(layout(1))
    assert {name: os.environ[name] for name in ALONE} == ALONE | {"MASTER_PORT": "1234"}
    monkeypatch.setenv("RANK", "1")
    settle_ranks(layout(1))
    assert os.environ["RANK"] == "1"
