"""A frozen teacher: it says what its checkpoint says in any layout, and its weight is that of the flag."""

import re

import pytest
import torch

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from tests.distributed import run_ranks
from tests.tiny import flags, train

STRATIFIED = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_k_grid": [1, 4]}
STRATIFIED |= {"emoe_budget_scales": True, "train_iters": 3, "global_batch_size": 8}
TOO_SMALL_TO_COUNT = 1e-30


def logged(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf" {name}: (\S+)", log)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train, 1, flags(save=folder, save_interval=4, lr=2e-2))
    return folder


@pytest.mark.slow
def test_of_no_weight_it_changes_nothing_and_where_the_run_begins_it_says_the_same_at_k(base):
    words = flags(**STRATIFIED, load=base, finetune=True, expert_model_parallel_size=2)
    plain = run_ranks(train, 2, words)
    small = [*words, "--emoe-teacher", str(base), "--emoe-teacher-weight", str(TOO_SMALL_TO_COUNT)]
    taught = run_ranks(train, 2, small)
    for mine, theirs in zip(taught, plain, strict=True):
        assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in theirs.weights)
    assert min(logged(taught[1].log, "distillation loss")) > 0
    teacher = [route for route in taught[1].routes if not route.training]
    assert {int(route.map_TE.sum(1).max()) for route in teacher} == {2} and not any(route.grad for route in teacher)
    at_k = flags(load=base, finetune=True, train_iters=3, lr=1e-2, expert_model_parallel_size=2)
    own = run_ranks(train, 2, [*at_k, "--emoe-teacher", str(base)])
    first, *_, last = logged(own[1].log, "distillation loss")
    assert abs(first) < 1e-6 < 1e-5 < last  # the model that begins is its own teacher, and then leaves it


@pytest.mark.slow
def test_the_gradient_is_the_stated_mixture_of_those_of_both_losses(base):
    """In micro-batches of every k', which count differently."""
    words = flags(**STRATIFIED | {"train_iters": 1, "clip_grad": 0, "emoe_other_weight": 0.3}, load=base, finetune=True)

    def gradient(*more: str) -> torch.Tensor:
        (run,) = run_ranks(train, 1, [*words, *more])
        return torch.cat([each.flatten() for each in run.gradients[0]])

    teacher = ("--emoe-teacher", str(base), "--emoe-teacher-weight")
    alone, mixed, whole = gradient(), gradient(*teacher, "0.25"), gradient(*teacher, "1")
    assert (alone - whole).norm() > 0.1 * alone.norm()
    torch.testing.assert_close(mixed, 0.75 * alone + 0.25 * whole, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_whole_weight_holds_the_model_at_its_teacher_and_a_run_goes_on_with_it(base, tmp_path):
    words = flags(**STRATIFIED | {"train_iters": 12, "save": tmp_path, "save_interval": 6, "lr": 1e-2})
    words += ["--pretrained-checkpoint", str(base), "--load", str(tmp_path)]
    teacher = ["--emoe-teacher", str(base), "--emoe-teacher-weight", "1"]
    (whole,) = run_ranks(train, 1, [*words, *teacher])
    distances = logged(whole.log, "distillation loss")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("6")
    (again,) = run_ranks(train, 1, [*words, *teacher])
    assert all(torch.equal(again.weights[name], whole.weights[name]) for name in whole.weights)
    assert sum(distances[-4:]) < sum(distances[:4])


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"emoe_teacher_weight": 0.5}, "--emoe-teacher-weight 0.5: has no meaning without --emoe-teacher"),
        ({"emoe_teacher": "b", "emoe_teacher_weight": 0.0}, "--emoe-teacher-weight 0.0: must lie in (0, 1]"),
        (
            {"emoe_teacher": "b", "emoe_k_schedule": "stratified", "emoe_selection": "prefix", "emoe_second_pass": 0.5},
            "--emoe-teacher b: excludes --emoe-second-pass 0.5: a third pass",
        ),
        (
            {
                "emoe_teacher": "b",
                "emoe_k_schedule": "stratified",
                "emoe_selection": "prefix",
                "emoe_distill_coeff": 0.5,
            },
            "--emoe-teacher b: excludes --emoe-distill-coeff 0.5: one teacher",
        ),
    ],
)
def test_flag_value_and_rule(settings, rule):
    with pytest.raises(ValueError, match=re.escape(rule)):
        validate_elastic(ElasticConfig(**settings), model_k=2, num_experts=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--emoe-teacher", "none"], "--emoe-teacher none: no such folder"),
        (["--emoe-teacher", "BASE", "--num-layers", "3"], "--num-layers 3: the checkpoint in --emoe-teacher"),
        (["--emoe-teacher", "BASE", "--pipeline-model-parallel-size", "2"], "cannot be combined with --pipeline-model"),
    ],
)
def test_another_model_or_none_is_refused_before_the_start(words, rule, base):
    words = flags() + [str(base) if word == "BASE" else word for word in words]
    with pytest.raises(RuntimeError, match=re.escape(rule)):
        run_ranks(train, 2 if "--pipeline-model-parallel-size" in words else 1, words)
