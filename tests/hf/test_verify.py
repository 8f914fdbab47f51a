"""The proof of a conversion on tiny random models of every architecture, and what it does where models may differ.

Router scores of random models have near ties too; with the seeds here no token meets one in fp32 (the tests say so).
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emoe.hf.comparison import Answer, Distance, Trace, differing_sets, distance, reached_by_no_tie
from tests import hf_models
from tests.distributed import run_ranks
from tests.hf_models import MODEL_TYPES, VARIANTS

pytestmark = pytest.mark.slow

KS = [1, 2, 5, 8]  # the models have 8 experts and k = 2


def examine(model_type: str, folder: Path) -> dict:
    """Everything about one architecture, on one rank."""
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import random_tokens, text_tokens, verify

    def imported(name: str, **options) -> tuple[Path, Path]:
        hf = hf_models.save(model_type, folder / name / "hf", **options)
        import_model(hf, folder / name / "megatron", report=said.append)
        return hf, folder / name / "megatron"

    said: list[str] = []
    plain = imported("plain", tokenizer=True)
    stored_bf16 = imported("bf16", dtype=torch.bfloat16, max_shard_size="30KB")
    variant = imported("variant", **VARIANTS[model_type])
    (folder / "text").write_text(" ".join(f"w{7 * i % 100 + 4}" for i in range(64)))
    text = text_tokens(plain[0], folder / "text", sequences=2, length=32)
    few = {"tokens": random_tokens(128, sequences=2, length=32), "report": said.append}
    return {
        "every k": verify(*plain, ks=KS, tokens=hf_models.tokens(batch=4, length=32), report=said.append),
        "stored bf16": verify(*stored_bf16, **few),
        "bf16": verify(*stored_bf16, ks=[2, 8], bf16=True, report=said.append),
        "variant": verify(*variant, **few),
        "text": verify(*plain, tokens=text, report=said.append),
        "layers": check_layers(plain[0], plain[1] / "release", report=said.append),
        "layers bf16": check_layers(stored_bf16[0], stored_bf16[1] / "release", report=said.append),
        "layers variant": check_layers(variant[0], variant[1] / "release", report=said.append),
        "said": said,
    }


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The examination of an architecture, done once."""
    done: dict[str, dict] = {}

    def get(model_type: str) -> dict:
        if model_type not in done:
            done[model_type] = run_ranks(examine, 1, model_type, tmp_path_factory.mktemp(model_type))[0]
        return done[model_type]

    return get


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("case", ["every k", "stored bf16", "variant", "text"])
def test_fp32_agrees_to_rounding(examined, model_type, case):
    report = examined(model_type)[case]
    assert report.passed and report.dtype == "fp32"
    if case == "every k":
        assert [row.k for row in report.rows] == KS
    for row in report.rows:
        assert row.ours.max_difference <= 1e-5
        assert row.ours.kl <= 1e-10
        assert row.ours.other_top1 == row.ours.other_sets == row.ties == 0
        assert row.compared == row.tokens
        assert row.first_layer is None and row.first_layer_sets is None


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_bf16_is_as_near_as_bf16_can_be(examined, model_type):
    report = examined(model_type)["bf16"]
    assert report.passed and report.dtype == "bf16"
    for row in report.rows:
        assert 0 < row.ours.kl < 3e-2
        assert row.ours.max_difference > 1e-3  # it did run in bf16
    everyone = report.rows[-1]
    assert everyone.ours.other_sets == 0  # with every expert active there is nothing to choose


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("case", ["layers", "layers bf16", "layers variant"])
def test_every_layer_agrees_at_k_and_with_all_experts(examined, model_type, case):
    config = hf_models.config(model_type, **(VARIANTS[model_type] if case == "layers variant" else {}))
    dense = {"deepseek_v2": getattr(config, "first_k_dense_replace", 0), "ernie4_5_moe": 1}.get(model_type, 0)
    expected = [("embedding", None), *((f"layer {n}", None) for n in range(dense))]
    for n in range(dense, config.num_hidden_layers):
        expected += [(f"layer {n}", config.num_experts_per_tok), (f"layer {n}", config.num_experts)]
    report = examined(model_type)[case]
    assert [(row.part, row.k) for row in report.rows] == [*expected, ("head", None)]
    assert report.largest.difference < 3e-6
    assert not any(row.ties for row in report.rows)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_report_is_json_and_a_table(examined, model_type):
    report = examined(model_type)["every k"]
    stored = json.loads(json.dumps(report.to_dict()))
    assert stored["passed"] is True and len(stored["rows"]) == len(KS)
    assert stored["rows"][1]["ours"]["kl"] == report.rows[1].ours.kl
    lines = report.table().splitlines()
    assert len(lines) == len(KS) + 2 and lines[-1] == "fp32: the same model"
    assert report.table() in examined(model_type)["said"]


def refusals(folder: Path) -> list[str]:
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import text_tokens, verify

    hf = hf_models.save("olmoe", folder / "hf")
    other = hf_models.save("olmoe", folder / "other", num_hidden_layers=3)
    larger = hf_models.save("olmoe", folder / "larger", vocab_size=160)
    import_model(hf, folder / "out", report=lambda line: None)
    (folder / "text").write_text("w7 w8 w9")
    lacking = hf_models.save("olmoe", folder / "lacking")
    tensors = load_file(lacking / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_norm.weight"]
    save_file(tensors, lacking / "model.safetensors", metadata={"format": "pt"})
    attempts = [
        lambda: verify(hf, folder / "out", ks=[2, 9]),
        lambda: verify(hf, folder / "out", tokens=torch.tensor([[0, 128]])),
        lambda: verify(hf, folder / "hf"),
        lambda: verify(other, folder / "out"),
        lambda: verify(larger, folder / "out"),
        lambda: verify(folder / "nowhere", folder / "out"),
        lambda: text_tokens(hf, folder / "text"),
        lambda: check_layers(other, folder / "out" / "release"),
        lambda: check_layers(hf, folder / "out"),
        lambda: verify(lacking, folder / "out"),
        lambda: check_layers(lacking, folder / "out" / "release"),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as refused:
            attempt()
        messages.append(str(refused.value).replace(str(folder), "F"))
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(ValueError, match="^WORLD_SIZE 2: a check runs in one process, without torchrun$"):
        check_layers(hf, folder / "out" / "release")
    return messages


def test_what_cannot_be_compared_is_refused(tmp_path):
    messages = run_ranks(refusals, 1, tmp_path)[0]
    assert messages[0] == "--k 9: must lie in [1, 8], the number of experts"
    assert messages[1] == "tokens 0 to 128: the model has 0 to 127"
    assert messages[2].startswith("checkpoint F/hf: no checkpoint in it")
    assert messages.pop(3) == "--num-layers 2: the checkpoint was trained with it, F/other/config.json means 3"
    assert messages.pop(3) == "--padded-vocab-size 128: the checkpoint has it, F/larger/config.json means 160"
    assert messages[3] == "F/nowhere/config.json: no such file; F/nowhere is no Hugging Face model"
    assert messages[4].startswith("--text F/text: ")
    assert messages[5] == "F/out/release: 2 layers, F/other has 3"
    assert messages[6] == "checkpoint F/out: not a torch_dist checkpoint (.metadata is missing)"
    lost = "self_attn.q_norm.weight"
    assert messages[7] == f"F/lacking: not in its files, or of another shape: model.layers.1.{lost}"
    assert messages[8] == f"F/lacking: layer 1: transformers cannot place model.layers.0.{lost}"


def trace(scores: list[list[float]], k: int = 1, layers: int = 2) -> Trace:
    """One sequence through layers that all score like this; scores of each position."""
    scores_BSE = torch.tensor([scores])
    chosen_BSE = torch.zeros_like(scores_BSE, dtype=torch.bool).scatter(2, scores_BSE.topk(k).indices, True)
    made = Trace()
    for layer in range(layers):
        made.outputs_BSD[layer] = torch.ones(1, len(scores), 4)
        made.chosen_BSE[layer], made.scores_BSE[layer] = chosen_BSE, scores_BSE
    return made


def test_a_tie_is_told_from_another_choice():
    expected = trace([[0.5, 0.499999], [0.6, 0.4], [0.500001, 0.499]])
    found = trace([[0.499999, 0.5], [0.6, 0.4], [0.499, 0.500001]])
    differs, ties = differing_sets(expected, found, 0)
    assert differs.tolist() == [[True, False, True]]
    assert ties.tolist() == [[True, False, False]]


def test_another_number_of_experts_is_no_tie():
    expected, found = trace([[0.5, 0.5, 0.0]], k=1), trace([[0.5, 0.5, 0.0]], k=2)
    differs, ties = differing_sets(expected, found, 0)
    assert differs.all() and not ties.any()


def test_a_tie_reaches_what_comes_after_it_and_nothing_else_is_forgiven():
    expected, found = trace([[0.9, 0.1]] * 4), trace([[0.9, 0.1]] * 4)
    expected.scores_BSE[0] = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [0.5, 0.5], [0.9, 0.1]]])
    for layer, positions in ((0, [2]), (1, [2, 3])):  # the tie, and what follows from it
        found.chosen_BSE[layer] = found.chosen_BSE[layer].clone()
        for position in positions:
            found.chosen_BSE[layer][0, position] = torch.tensor([False, True])
    clean, ties, first = reached_by_no_tie(expected, found, 1e-5)
    assert clean.tolist() == [[True, True, False, False]] and ties == 1 and first is None
    found.chosen_BSE[1][0, 1] = torch.tensor([False, True])  # before the tie: its own difference
    assert reached_by_no_tie(expected, found, 1e-5)[2] == 1
    clean, ties, first = reached_by_no_tie(expected, found, None)
    assert clean.all() and ties == 0 and first == 0


def test_distance_by_hand():
    routed = trace([[0.9, 0.1], [0.9, 0.1]])
    other = trace([[0.9, 0.1], [0.1, 0.9]])
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.25, 0.75])
    expected, found = (Answer(torch.stack([p.log(), x.log()])[None], t) for x, t in ((p, routed), (q, other)))
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    result = distance(expected, found, everywhere)
    log3 = torch.tensor(3.0).log().item()
    assert result.max_difference == pytest.approx(log3)
    assert result.kl == pytest.approx((0.75 * log3 - 0.25 * log3) / 2)
    assert result.other_top1 == result.other_sets == 0.5
    assert distance(expected, found, ~everywhere) == Distance(*[torch.inf] * 4)
