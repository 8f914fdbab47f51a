"""One tiny model swept through Megatron and through transformers: equal numbers at every k', uniform and per layer."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepResult
from tests import hf_models, sweeps
from tests.distributed import run_ranks
from tests.sweeps import Answer, run_tool

pytestmark = pytest.mark.slow

KS = [1, 2, 5, 8]  # the models have 8 experts and k = 2
FIRST = {"olmoe": 1, "qwen2_moe": 1, "deepseek_v2": 2, "ernie4_5_moe": 2}  # number of the first MoE layer, of two
BY_OTHER_RULES = "deepseek_v3"  # its flags name the rule that makes weights of scores
EVIDENCE = ("qwen2_moe", "ernie4_5_moe")
TAIL = ["4:0.3", "8:0.1"]


def prepare(model_type: str, folder: Path) -> None:
    """The model in both forms, and held-out tokens."""
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save(model_type, folder / "hf"), folder / "megatron", report=lambda _line: None)
    sweeps.write_tokens(folder / "data")


def run_sweep(model_type: str, folder: Path, framework: str, tail: bool) -> Answer:
    model = {"load": str(folder / "megatron")} if framework == "megatron" else {"hf": str(folder / "hf")}
    asked = {"k": KS, "k_per_layer": ["1,5", "5,1"]} if not tail else {"k": [2, 4, 6], "k_per_layer": ["6,2"]}
    extra = {"emoe_tail_scale": TAIL} if tail else {"evidence": model_type in EVIDENCE or None, "agreement": True}
    return run_tool("sweep_k", *sweeps.flags(folder / "data", _out(folder, framework, tail), **model, **asked, **extra))


def _out(folder: Path, framework: str, tail: bool) -> Path:
    return folder / f"{framework}{'_tail' * tail}.json"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder, and what the two sweeps of a model said, done once."""
    folders: dict[str, Path] = {}
    done: dict[tuple[str, bool], list[Answer]] = {}

    def get(model_type: str, tail: bool = False) -> tuple[Path, list[Answer]]:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            run_ranks(prepare, 1, model_type, folders[model_type])
        if (model_type, tail) not in done:
            words = (folders[model_type], "megatron", tail), (folders[model_type], "transformers", tail)
            answers = [run_ranks(run_sweep, 1, model_type, *each)[0] for each in words]
            assert [answer.status for answer in answers] == [None, None], answers
            done[model_type, tail] = answers
        return folders[model_type], done[model_type, tail]

    return get


def results(folder: Path, tail: bool = False) -> tuple[SweepResult, SweepResult]:
    ours, theirs = (sweep.load(_out(folder, framework, tail)) for framework in ("megatron", "transformers"))
    return ours, theirs


@pytest.mark.parametrize("model_type", [*hf_models.MODEL_TYPES, BY_OTHER_RULES])
def test_equal_numbers_on_both(swept, model_type):
    ours, theirs = results(swept(model_type)[0])
    assert [cell.k for cell in ours.cells] == [*KS, (1, 5), (5, 1)] == [cell.k for cell in theirs.cells]
    assert ours.data == theirs.data and ours.data.digest is not None
    assert (ours.framework, theirs.framework) == ("megatron", "transformers")
    assert (ours.k_train, ours.num_moe_layers, ours.tail_scale) == (2, 2, None)
    for mine, other in zip(ours.cells, theirs.cells, strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=2e-5)
        assert mine.block_losses == pytest.approx(other.block_losses, abs=1e-4) and len(mine.block_losses) == 64
        for field in ("tokens", "rows_per_layer", "expert_flops_per_token", "active_params", "flops_per_token"):
            assert getattr(mine, field) == getattr(other, field), field
    losses = [cell.loss for cell in ours.cells]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4  # every k' has its own


@pytest.mark.parametrize("model_type", hf_models.MODEL_TYPES)
def test_rows_prove_every_k(swept, model_type):
    first = FIRST[model_type]
    for cell in results(swept(model_type)[0])[0].cells:
        ks = (cell.k, cell.k) if isinstance(cell.k, int) else cell.k
        assert cell.tokens == 64 * sweeps.LENGTH
        assert cell.rows_per_layer == {str(first): ks[0] * cell.tokens, str(first + 1): ks[1] * cell.tokens}


@pytest.mark.parametrize("model_type", hf_models.MODEL_TYPES)
def test_answers_change_with_the_budget_alike(swept, model_type):
    ours, theirs = results(swept(model_type)[0])
    for mine, other in zip(ours.cells, theirs.cells, strict=True):
        assert mine.agreement == pytest.approx(other.agreement, abs=2 / mine.tokens)  # ties of rounding
        assert mine.kl_to_k == pytest.approx(other.kl_to_k, rel=1e-3, abs=1e-7)
    at_k = next(cell for cell in ours.cells if cell.k == 2)
    assert (at_k.agreement, at_k.kl_to_k) == (1.0, 0.0)
    assert all(cell.agreement < 1 and cell.kl_to_k > 1e-5 for cell in ours.cells if cell.k != 2)


@pytest.mark.parametrize("model_type", EVIDENCE)
def test_evidence_is_equal_too(swept, model_type):
    folder, _ = swept(model_type)
    for mine, other in zip(*(result.cells for result in results(folder)), strict=True):
        assert mine.load == other.load and mine.coverage is other.coverage is None
        assert mine.router_entropy == pytest.approx(other.router_entropy, abs=1e-5)
    matrices = [load_file(folder / f"{name}.coactivation.safetensors") for name in ("megatron", "transformers")]
    assert matrices[0].keys() == matrices[1].keys() and len(matrices[0]) == 2 * (len(KS) + 2)
    assert all((matrices[0][name] == matrices[1][name]).all() for name in matrices[0])
    pairs = matrices[0][f"k5-1.layer.{FIRST[model_type]}"]
    tokens = 64 * sweeps.LENGTH
    assert pairs.diagonal().sum() == 5 * tokens and pairs.sum() == 25 * tokens  # each token uses 5 x 5 (ordered) pairs


@pytest.mark.parametrize("model_type", EVIDENCE)
def test_a_tail_scale_is_used_and_recorded_by_both(swept, model_type):
    plain = {cell.k: cell.loss for cell in results(swept(model_type)[0])[0].cells}
    ours, theirs = results(swept(model_type, True)[0], True)
    assert ours.tail_scale == theirs.tail_scale == {"4": 0.3, "8": 0.1}
    for mine, other in zip(ours.cells, theirs.cells, strict=True):
        assert mine.loss == pytest.approx(other.loss, abs=2e-5)
    assert sweep.loss_at(ours, 2) == plain[2]
    assert len({cell.loss for cell in ours.cells}) == 4


@pytest.mark.parametrize("model_type", ["olmoe", "ernie4_5_moe"])
def test_models_without_elastic_settings_are_swept_and_it_is_said(swept, model_type):
    folder, (ours, theirs) = swept(model_type)
    said = f"--load {folder}/megatron: no elastic settings in this checkpoint; it is swept as a model of plain top-k"
    assert ours.out.count(said) == 1
    said = f"--hf {folder}/hf: no elastic settings in its config.json; it is swept as a model of plain top-k"
    assert theirs.out.count(said) == 1
