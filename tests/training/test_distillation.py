"""Self-distillation: the divergence against torch's own, who teaches whom, and a whole run with and without it."""

import re
import weakref

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_emoe.routing.active_k import Place, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.training.distillation import wants_teacher
from tests.distributed import run_ranks
from tests.tiny import BASE, arguments, flags, start, train

LARGER = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-larger", "emoe_k_max": 5}
EP2 = {"expert_model_parallel_size": 2}
STEPS = {"train_iters": 6, "global_batch_size": 8}
TOO_SMALL_TO_COUNT = 1e-30
TOKENS_OF_A_RANK = BASE["micro_batch_size"] * BASE["seq_length"]


def divergence_of_a_shard(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence of two ranks' halves of a vocabulary of 12, and the gradient of its weighted sum."""
    from megatron.core import parallel_state

    from megatron_emoe.training import distillation

    distillation._CHUNK = 12  # two rows of half a vocabulary at a time
    start(tensor_model_parallel_size=2)
    own, teacher, weights = logits_of_two_models(dtype)
    half = slice(6 * parallel_state.get_tensor_model_parallel_rank(), None)
    own = own[..., half][..., :6].requires_grad_()
    group = parallel_state.get_tensor_model_parallel_group()
    divergence = distillation.teacher_divergence(own, teacher[..., half][..., :6], group)
    (divergence * weights).sum().backward()
    return divergence.detach(), own.grad


def logits_of_two_models(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    own, teacher = (30 * torch.randn(2, 3, 12, generator=generator) for _ in range(2))
    return own.to(dtype), teacher.to(dtype), torch.rand(2, 3, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_value_and_gradient_over_two_shards_are_those_of_torch_over_the_whole(dtype):
    shards = run_ranks(divergence_of_a_shard, 2, dtype)
    own, teacher, weights = logits_of_two_models(dtype)
    own.requires_grad_()
    targets = log_softmax(teacher.double(), dim=-1)
    expected = kl_div(log_softmax(own.double(), dim=-1), targets, reduction="none", log_target=True).sum(-1)
    (expected * weights).sum().backward()
    for divergence, _ in shards:
        torch.testing.assert_close(divergence.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    gradient = torch.cat([grad for _, grad in shards], dim=-1)
    torch.testing.assert_close(gradient, own.grad, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


class Held(TorchDispatchMode):
    """The most bytes that new tensors hold at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self.held: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place = storage.data_ptr()
                size, users = self.held.get(place, (storage.nbytes(), 0))
                self.held[place] = size, users + 1
                weakref.finalize(tensor, self._let_go, place)
        self.most = max(self.most, sum(size for size, _ in self.held.values()))
        return found

    def _let_go(self, place: int) -> None:
        size, users = self.held.pop(place)
        if users > 1:
            self.held[place] = size, users - 1


def held_by_the_divergence() -> float:
    """Memory that the divergence and its gradient take, as a multiple of that of one model's logits."""
    from megatron.core import parallel_state

    from megatron_emoe.training import distillation

    start()
    distillation._CHUNK = 1000
    own, teacher = (torch.randn(4, 100, 200) for _ in range(2))
    with Held() as held:
        group = parallel_state.get_tensor_model_parallel_group()
        distillation.teacher_divergence(own.requires_grad_(), teacher, group).sum().backward()
    return held.most / own.nbytes


def test_beside_logits_and_gradient_nothing_of_their_size_is_held():
    # The gradient, and the teacher's logits, which are seen where a view of them is made.
    assert run_ranks(held_by_the_divergence, 1)[0] < 2.5


STRATIFIED = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_k_grid": [1, 4]}


@pytest.mark.parametrize("draw", ["step", "layer"])
def test_a_teacher_is_wanted_exactly_where_a_layer_draws_another_number(draw):
    elastic = ElasticConfig(**LARGER, emoe_k_draw=draw, emoe_distill_coeff=0.5)
    answers = set()
    for iteration in range(40):
        drawn = [scheduled_k(elastic, 2, Place(iteration, 0, layer)) for layer in (1, 2, 3)]
        wanted = wants_teacher(elastic, 2, Place(iteration, 0), num_layers=3)
        assert wanted == (max(drawn) > 2)
        answers.add(wanted)
    assert answers == {True, False}
    assert not any(wants_teacher(ElasticConfig(**LARGER), 2, Place(i, 0), num_layers=3) for i in range(40))


def test_below_k_there_is_a_teacher_too():
    elastic = ElasticConfig(**STRATIFIED, emoe_distill_coeff=0.5)
    places = [Place(0, microbatch, microbatches=8) for microbatch in range(8)]
    drawn = [scheduled_k(elastic, 2, place) for place in places]
    assert sorted(drawn) == [1, 1, 2, 2, 2, 2, 4, 4]
    assert [wants_teacher(elastic, 2, place, num_layers=2) for place in places] == [k != 2 for k in drawn]


class Saying(torch.nn.Module):
    """Says the given logits [1, sequence, vocabulary], one after the other, and has the core's loss."""

    def __init__(self, *logits_BSV: torch.Tensor) -> None:
        super().__init__()
        self.said = iter(logits_BSV)

    def forward(self, **inputs: object) -> torch.Tensor:
        assert inputs["labels"] is None
        return next(self.said)

    def compute_language_model_loss(self, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        return vocab_parallel_cross_entropy(logits_SBV, labels_BS.t().contiguous()).t()


def taught_by_one_sequence(passes: int) -> tuple[torch.Tensor, ...]:
    """Losses and divergence of one sequence in fp32, whose logits the core's cross-entropy overwrites; gradients."""
    from megatron_emoe.training.distillation import forward_twice, forward_with_teacher

    start()
    own, teacher, _ = logits_of_two_models(torch.float32)
    own, teacher = own[:1].requires_grad_(), teacher[:1].requires_grad_()
    model, inputs = Saying(teacher * 1, own * 1), {"labels": LABELS[None], "loss_mask": None}
    if passes == 2:
        losses = forward_twice(model, inputs, lambda: None)
    else:
        losses = torch.stack([torch.zeros(1, 3), *forward_with_teacher(model, inputs)])
    losses.sum().backward()
    return losses.detach()[:, 0], own.grad, teacher.grad


LABELS = torch.tensor([3, 0, 11])


@pytest.mark.slow
def test_one_sequence_in_fp32_has_the_losses_and_gradients_of_torch():
    twice, once = (run_ranks(taught_by_one_sequence, 1, passes)[0] for passes in (2, 1))
    own, teacher, _ = logits_of_two_models(torch.float32)
    own, teacher = own[0].double().requires_grad_(), teacher[0].double().requires_grad_()
    expected = [cross_entropy(logits, LABELS, reduction="none") for logits in (teacher, own)]
    targets = log_softmax(teacher.detach(), dim=-1)
    expected.append(kl_div(log_softmax(own, dim=-1), targets, reduction="none", log_target=True).sum(-1))
    torch.stack(expected).sum().backward()
    torch.testing.assert_close(twice[0].double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(once[0][1:].double(), torch.stack(expected[1:]).detach(), rtol=1e-5, atol=1e-5)
    for found, wanted in ((twice[1], own.grad), (twice[2], teacher.grad), (once[1], own.grad)):
        torch.testing.assert_close(found[0].double(), wanted, rtol=1e-4, atol=1e-5)
    assert once[2] is None


def logged(log: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf" {name}: (\S+)", log)]


@pytest.mark.slow
def test_with_a_weight_too_small_to_count_a_run_is_the_run_without_and_the_teacher_ran_at_k():
    words = flags(**EP2 | LARGER | STEPS)
    plain = run_ranks(train, 2, words)
    taught = run_ranks(train, 2, [*words, "--emoe-distill-coeff", str(TOO_SMALL_TO_COUNT)])
    for mine, theirs in zip(taught, plain, strict=True):
        assert mine.weights.keys() == theirs.weights.keys()
        assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in mine.weights)
    assert logged(taught[1].log, "lm loss") == logged(plain[1].log, "lm loss")
    assert len(logged(taught[1].log, "distillation loss")) == STEPS["train_iters"]

    elastic = ElasticConfig(**LARGER, emoe_distill_coeff=TOO_SMALL_TO_COUNT)
    teaching = [i for i in range(STEPS["train_iters"]) if wants_teacher(elastic, 2, Place(i, 0), num_layers=2)]
    assert 0 < len(teaching) < STEPS["train_iters"]
    for run in taught:
        routes = [route for route in run.routes if not route.training]
        assert all(not route.grad and route.map_TE.sum() == 2 * TOKENS_OF_A_RANK for route in routes)
        assert {route.step for route in routes} == set(teaching)
    distances = logged(taught[1].log, "distillation loss")
    for step in (0, *range(2, STEPS["train_iters"])):  # the core's second line still holds the first step
        assert (distances[step] > 0) == (step in teaching)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"emoe_other_weight": 0.3}, {"emoe_second_pass": 0.3}], ids=["stratified", "twice"])
def test_below_and_above_k_too_a_weight_too_small_to_count_changes_nothing(more):
    words = flags(**STRATIFIED | STEPS | more)
    (plain,) = run_ranks(train, 1, words)
    (taught,) = run_ranks(train, 1, [*words, "--emoe-distill-coeff", str(TOO_SMALL_TO_COUNT)])
    assert all(torch.equal(taught.weights[name], plain.weights[name]) for name in plain.weights)
    assert min(logged(taught.log, "distillation loss")) > 0
    assert len(logged(plain.log, "second pass loss")) == len(logged(taught.log, "second pass loss"))
    teachers = [route for route in taught.routes if not route.training]
    assert bool(teachers) == ("emoe_second_pass" not in more)


@pytest.mark.slow
def test_the_divergence_counts_as_the_losses_of_its_micro_batch_do():
    """With other k' weighted next to nothing, what they are taught weighs next to nothing."""
    nothing = {"train_iters": 1, "clip_grad": 0, "global_batch_size": 8, "emoe_other_weight": 1e-6}
    words = flags(**STRATIFIED | nothing)
    plain, taught = (
        torch.cat([each.flatten() for each in run_ranks(train, 1, [*words, *more])[0].gradients[0]])
        for more in ([], ["--emoe-distill-coeff", "5"])
    )
    assert (plain - taught).norm() < 1e-3 * plain.norm()


@pytest.mark.slow
@pytest.mark.parametrize("stratified", [False, True], ids=["larger", "twice, below"])
def test_distillation_draws_the_outputs_together(stratified):
    below = STRATIFIED | {"emoe_k_grid": [1], "emoe_second_pass": 1, "train_iters": 25, "lr": 1e-2}
    words = flags(**EP2 | LARGER | STEPS | {"emoe_k_default_prob": 1e-9, "train_iters": 25, "lr": 1e-2})
    words = flags(**EP2 | STEPS | below) if stratified else words
    loose, tight = (
        logged(run_ranks(train, 2, [*words, "--emoe-distill-coeff", str(coeff)])[1].log, "distillation loss")[-5:]
        for coeff in (TOO_SMALL_TO_COUNT, 10)
    )
    assert sum(tight) < sum(loose) * (0.9 if stratified else 0.5)  # at k' = 1 it is about another expert's whole share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"emoe_distill_coeff": -1.0}, r"--emoe-distill-coeff -1.0: must be a finite number of at least 0"),
        (
            {"emoe_selection": None, "emoe_k_schedule": None, "emoe_k_max": None},
            r"--emoe-distill-coeff 0.5: needs an --emoe-k-schedule that draws another number than --moe-router-topk 2",
        ),
        (
            {"mtp_num_layers": 1},
            r"--emoe-distill-coeff 0.5 cannot be combined with --mtp-num-layers 1: its losses are computed inside",
        ),
        (
            {"pipeline_model_parallel_size": 2},
            r"--emoe-distill-coeff 0.5 cannot be combined with --pipeline-model-parallel-size 2: both passes",
        ),
    ],
)
def test_refused(settings, message):
    with pytest.raises(RuntimeError, match=message):
        run_ranks(arguments_of, 2 if "pipeline_model_parallel_size" in settings else 1, settings)


def arguments_of(settings: dict) -> None:
    from megatron_emoe.routing.transformer_config import elastic_config_from_args

    elastic_config_from_args(arguments(flags(**LARGER | {"emoe_distill_coeff": 0.5} | settings)))
