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
    overlap = sweeps.flags(folder / "data", folder / "overlap.json", **swept | {"k": [2, 4], "max_eval_tokens": TOKENS})
    answers["overlap"] = run_tool("sweep_k", *overlap)
    return answers | finished(folder, swept) | without_numbers(folder)


def finished(folder: Path, swept: dict[str, object]) -> dict[str, Answer]:
    """The first sweep asked for again, with one thing changed at a time; plain top-k, as it was measured."""
    same = swept | {"emoe_tail_scale": None, "load": folder / "unfitted"}
    shutil.copytree(folder / "megatron", folder / "unfitted")
    for table in (folder / "unfitted").glob("*/emoe_tail_scale.json"):
        table.unlink()
    data = sweeps.write_tokens(folder / "replaced", documents=60)
    sweeps.write_tokens(folder / "other", documents=60, seed=6)
    out, kept, said = folder / "again.json", folder / "again.kept.json", {}

    def ask(name: str, **changes: object) -> None:
        said[f"finished: {name}"] = run_tool("sweep_k", *sweeps.flags(data, out, **same | changes))

    ask("first", label="first")
    shutil.copy(out, kept)
    ask("same")
    ask("label", label="second")
    ask("length", seq_length=2 * sweeps.LENGTH)
    ask("tokens", max_eval_tokens=TOKENS)
    ask("dtype", bf16=True)
    for suffix in (".bin", ".idx"):
        shutil.copy(folder / f"other{suffix}", f"{data}{suffix}")
    shutil.rmtree(data)  # what Megatron noted of the old data
    ask("data")
    return said


def without_numbers(folder: Path) -> dict[str, Answer]:
    """Sweeps of either kind and a fit of a model with NaN in an expert."""
    from megatron_emoe.hf.import_model import import_model

    hf = hf_models.break_expert(folder / "hf", folder / "broken")
    import_model(hf, folder / "broken_megatron", report=lambda _line: None)
    out = folder / "broken.json"
    answers = {
        "nan: hf": run_tool("sweep_k", *sweeps.flags(folder / "data", out, hf=hf, k=[8])),
        "nan: load": run_tool("sweep_k", *sweeps.flags(folder / "data", out, load=folder / "broken_megatron", k=[8])),
        "nan: fit": run_tool("fit_tail_scale", *flags(folder, load=folder / "broken_megatron")),
    }
    assert not out.exists() and not list((folder / "broken_megatron").glob("*/emoe_tail_scale.json"))
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


REFUSED = {"length", "tokens", "dtype", "data"}


def test_all_calls_end_well(done):
    ended = {name: answer for name, answer in done[1].items() if name.partition(": ")[2] not in REFUSED}
    wrong = {name: (answer.status, answer.err[-300:]) for name, answer in ended.items() if answer.status}
    assert set(wrong) == {"nan: hf", "nan: load", "nan: fit"}, wrong


def test_a_finished_sweep_is_compared_with_what_is_asked(done):
    folder, answers = done
    kept, now = (json.loads((folder / f"again{name}.json").read_text()) for name in (".kept", ""))
    assert (kept["label"], now["label"]) == ("first", "second")
    assert kept | {"label": "second"} == now  # as it was written, with its own command
    assert "| 4 |" in answers["finished: same"].out and "first: held-out loss" in answers["finished: same"].out
    told = {
        "length": f"data.sequence_length: {sweeps.LENGTH}; must equal this run's {2 * sweeps.LENGTH}",
        "tokens": f"data: {{'path': ['{folder}/replaced'], 'tokens': {64 * sweeps.LENGTH}}}; must equal this run's",
        "dtype": "dtype: 'float32'; must equal this run's 'bfloat16'",
        "data": f"second: data.digest: {now['data']['digest']}; the data now give ",
    }
    for name, message in told.items():
        answer = answers[f"finished: {name}"]
        assert answer.status == 2, (name, answer)
        assert answer.err.splitlines()[-1].startswith(f"sweep_k.py: error: --out {folder}/again.json: {message}")


def test_a_loss_that_is_no_number_is_not_stored(done):
    _, answers = done
    first = "the loss of held-out sequence 0 (of 64, counted from 0) is nan; nothing of it is stored"
    for name in ("hf", "load"):
        answer = answers[f"nan: {name}"]
        assert answer.status == 1 and answer.err.splitlines()[-1] == f"sweep_k.py: error: --k 8: {first}"
    answer = answers["nan: fit"]
    where = "--k 2, a = 1.000, in the half that is judged on"
    assert answer.status == 1 and answer.err.splitlines()[-1] == f"fit_tail_scale.py: error: {where}: {first}"


def test_a_sweep_over_what_was_fitted_on_says_so(done):
    _, answers = done
    warning = "warning: --data-path: at least 64 of the 128 sequences are among those that the tail scale was fitted on"
    assert warning in answers["overlap"].out and f"--max-eval-tokens {TOKENS // 2} or fewer" in answers["overlap"].out
    assert "warning: --data-path" not in answers["after"].out + answers["plain"].out


def test_every_cell_says_where_it_ran_and_how_sure_it_is(done):
    folder, answers = done
    result = sweep.load(folder / "before.json")
    assert set(result.versions) == {"megatron-core", "torch"} and result.training == {}
    for cell in result.cells:
        assert (cell.device, cell.ranks, len(cell.block_losses)) == ("cpu", 1, 64)
        assert sum(cell.block_losses) / 64 == pytest.approx(cell.loss, abs=1e-6)
    fitted = stored(folder)
    assert (fitted["tokens_before"], len(fitted["fitted_sequences"])) == (TOKENS // 2, 64)
    assert "use k' = " in answers["before"].out


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
