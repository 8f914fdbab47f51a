"""tools/fit_tail_scale.py on a tiny model: what it finds, where it puts it, and that sweeps then use it."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_emoe.sweep import curve as sweep
from tests import hf_models, sweeps
from tests.distributed import run_ranks
from tests.sweeps import Answer, run_tool

pytestmark = pytest.mark.slow

TOKENS = 128 * sweeps.LENGTH  # the fit's two halves have 64 sequences each, as many as a sweep of 64 reads


def flags(folder: Path, out: Path | None = None, **changes: object) -> list[str]:
    settings = {"load": folder / "megatron", "k": [4, 8], "max_eval_tokens": TOKENS} | changes
    return sweeps.flags(folder / "data", out, **settings)


def scenario(folder: Path) -> dict[str, Answer]:
    """A model, its fit, and sweeps before and after it."""
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save("qwen2_moe", folder / "hf"), folder / "megatron", report=lambda _line: None)
    sweeps.write_tokens(folder / "data", documents=60)
    swept = {"load": str(folder / "megatron"), "k": [2, 4, 8]}
    answers = {"before": run_tool("sweep_k", *sweeps.flags(folder / "data", folder / "before.json", **swept))}
    answers["fit"] = run_tool("fit_tail_scale", *flags(folder))
    answers["after"] = run_tool("sweep_k", *sweeps.flags(folder / "data", folder / "after.json", **swept))
    answers["fold"] = run_tool("fit_tail_scale", *flags(folder, k=[4], fold=True, out=folder / "fold.json"))
    plain = swept | {"emoe_tail_scale": ["1"]}
    answers["plain"] = run_tool("sweep_k", *sweeps.flags(folder / "data", folder / "plain.json", **plain))
    return answers


def sweep_with_router(folder: Path, factor: float) -> Answer:
    """The model's folder with every gate's weight times `factor`, swept at k' = 4 by transformers."""
    scaled = folder / "hf-scaled"
    shutil.copytree(folder / "hf", scaled)
    (file,) = scaled.glob("*.safetensors")
    weights = load_file(file)
    gates = {name: weight * factor for name, weight in weights.items() if name.endswith(".mlp.gate.weight")}
    assert len(gates) == 2
    save_file(weights | gates, file, metadata={"format": "pt"})
    return run_tool("sweep_k", *sweeps.flags(folder / "data", folder / "scaled.json", hf=scaled, k=[4]))


def fit_elsewhere(folder: Path) -> Answer:
    return run_tool("fit_tail_scale", *flags(folder, out=folder / "two.json", expert_model_parallel_size=2))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict[str, Answer]]:
    folder = tmp_path_factory.mktemp("fit")
    return folder, run_ranks(scenario, 1, folder)[0]


def stored(folder: Path) -> dict:
    (path,) = (folder / "megatron").glob("*/emoe_tail_scale.json")
    return json.loads(path.read_text())


def losses(folder: Path, name: str) -> dict[int, float]:
    return {k: cell.loss for k, cell in sweep.curve(sweep.load(folder / f"{name}.json")).items()}


def test_all_calls_end_well(done):
    assert {name: (answer.status, answer.err[-300:]) for name, answer in done[1].items() if answer.status} == {}


def test_the_table_is_judged_on_the_tokens_that_a_sweep_reads(done):
    folder, answers = done
    fitted, before = stored(folder)["fitted"], losses(folder, "before")
    for k in (4, 8):
        assert fitted[str(k)]["plain"] == pytest.approx(before[k], abs=1e-6)
        assert fitted[str(k)]["at_k"] == pytest.approx(before[2], abs=1e-6)
        assert f"| {k} | {fitted[str(k)]['scale']:.3f} |" in answers["fit"].out
    assert f"--max-eval-tokens {TOKENS // 2} or fewer reads nothing that was fitted on\n" in answers["fit"].out


def test_sweeps_use_the_table_and_say_so(done):
    folder, _ = done
    fit, after = stored(folder), sweep.load(folder / "after.json")
    assert after.tail_scale == {k: pytest.approx(scale) for k, scale in fit["tail_scale"].items()}
    for k in (4, 8):
        assert losses(folder, "after")[k] == pytest.approx(fit["fitted"][str(k)]["judged"], abs=1e-5)
    assert losses(folder, "after")[2] == losses(folder, "before")[2]


def test_a_factor_of_the_router_is_fitted_and_leaves_the_rest_as_it_was(done):
    folder, answers = done
    fold, fit = json.loads((folder / "fold.json").read_text())["fitted"]["4"], stored(folder)["fitted"]["4"]
    assert {name: fold[name] for name in fit} == fit
    assert 1 <= fold["router_scale"] <= 4
    assert fold["folded"] != fold["plain"]
    assert f"| {fold['router_scale']:.2f} | {fold['folded']:.4f} |" in answers["fold"].out


def test_the_folded_loss_is_that_of_a_model_with_such_gates(done):
    folder, _ = done
    fold = json.loads((folder / "fold.json").read_text())["fitted"]["4"]
    (answer,) = run_ranks(sweep_with_router, 1, folder, fold["router_scale"])
    assert answer.status is None, answer.err
    assert abs(fold["folded"] - fold["plain"]) > 1e-4  # the factor matters
    assert losses(folder, "scaled")[4] == pytest.approx(fold["folded"], abs=1e-5)


def test_a_given_scale_wins_over_the_table(done):
    assert losses(done[0], "plain") == losses(done[0], "before")


def test_expert_parallel_ranks_find_the_same(done):
    folder, _ = done
    answers = run_ranks(fit_elsewhere, 2, folder)
    assert [answer.status for answer in answers] == [None, None], answers
    assert answers[0].out.count("stored:") + answers[1].out.count("stored:") == 1
    one, two = stored(folder), json.loads((folder / "two.json").read_text())
    assert one["digest"] == two["digest"]
    for k in ("4", "8"):
        assert two["tail_scale"][k] == pytest.approx(one["tail_scale"][k], abs=0.03)
        assert two["fitted"][k]["judged"] == pytest.approx(one["fitted"][k]["judged"], abs=1e-4)


def refusals(folder: Path) -> list[Answer]:
    cases = (
        {"k": [2]},
        {"k": [9]},
        {"k": [4, 4]},
        {"max_scale": 0},
        {"max_scale": "inf"},
        {"max_scale": "nan"},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "k": [5]},
        {"moe_router_topk": 3},
        {"max_eval_tokens": 16 * 16},
        {"out": "/nowhere/a.json"},
    )
    return [run_tool("fit_tail_scale", *flags(folder, **case)) for case in cases]


def test_bad_input_is_refused_before_work_starts(done):
    answers = run_ranks(refusals, 1, done[0])[0]
    wanted = (
        "--k 2: must lie in [3, 8], above the k of the checkpoint",
        "--k 9: must lie in [3, 8]",
        "--k 4 4: must not name a k' twice",
        "--max-scale 0.0: must be above 0 and finite",
        "--max-scale inf: must be above 0 and finite",
        "--max-scale nan: must be above 0 and finite",
        "--k 5: 2 groups of 2 experts hold only 4",
        "--moe-router-topk 3: the model in --load",
        "--max-eval-tokens 256: too few for two batches, one for each half",
        "--out /nowhere/a.json: the folder /nowhere does not exist",
    )
    for answer, message in zip(answers, wanted, strict=True):
        assert answer.status == 2
        assert message in answer.err
