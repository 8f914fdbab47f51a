"""One k of training and one tail scale, from a fit over an export, transformers, an import and a second export."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.hf.active_experts import set_active_experts
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE
from tests import hf_models, sweep_results
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
WORDS = ["4:0.5", "8:0.125"]


def hand_over(folder: Path) -> dict[str, Any]:
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.import_model import arguments_of, import_model
    from megatron_emoe.hf.inspect_model import inspect
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import verify
    from megatron_emoe.model.checkpoint import stored_args
    from megatron_emoe.sweep import curve
    from megatron_emoe.sweep.exported import measured_in

    said: dict[str, list[str]] = {name: [] for name in ("fitted", "plain", "again")}
    import_model(hf_models.save("olmoe", folder / "hf"), folder / "first", report=str)
    export_model(folder / "first", folder / "plain", k=8, report=said["plain"].append)
    (folder / "first/release" / TAIL_SCALE_FILE).write_text('{"tail_scale": {"4": 0.5, "8": 0.125}}')
    cells = [sweep_results.make_cell(k, 3.0 - k / 100) for k in (2, 4, 8)]
    scale = {"4": 0.5, "8": 0.125}
    sweep = sweep_results.make_result("m", cells, k_train=2, num_experts=8, iteration=0, tail_scale=scale)
    curve.save(sweep, folder / "sweep.json")
    measured = partial(measured_in, folder / "sweep.json")
    export_model(folder / "first", folder / "back", k=8, measured=measured, report=said["fitted"].append)
    import_model(folder / "back", folder / "second", verify=check_layers, report=said["again"].append)
    export_model(folder / "second", folder / "third", report=str)
    stored = [stored_args(folder / "second/release"), arguments_of(folder / "back")[0]]
    return {
        "said": {name: "\n".join(lines) for name, lines in said.items()},
        "stored": [(args.moe_router_topk, args.emoe_tail_scale) for args in stored],
        "same": [
            verify(folder / "back", folder / name, ks=ks, report=str).passed
            for name, ks in (("second", [2, 8]), ("first", None))
        ],
        "seen": inspect(folder / "back").as_text(),
    }


@pytest.fixture(scope="module")
def handed(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hand_overs")
    return folder, run_ranks(hand_over, 1, folder)[0]


def block(folder: Path) -> tuple[int, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text())
    return config["num_experts_per_tok"], config["emoe"]


def test_an_export_says_that_its_k_has_a_tail_scale(handed):
    folder, seen = handed
    k, emoe = block(folder / "back")
    assert (k, emoe["k_train"], emoe["tail_scale"]) == (8, 2, WORDS)
    assert (emoe["best_k"], emoe["range_end"], emoe["measured_tail_scale"]) == (8, 8, WORDS)
    text = seen["said"]["fitted"]
    assert "--hf-overrides" not in text and "num_experts_per_tok=4" not in text
    assert f"""VLLM_PLUGINS=emoe vllm serve {folder}/back --additional-config '{{"emoe": {{"k": 4}}}}'""" in text
    assert f"as it stands, {folder}/back is served without the tail scale 0.125 that belongs to its k' = 8" in text
    assert "here k' = 4, to which the tail scale 0.5 belongs" in text
    assert "; megatron_emoe.set_active_experts(model, 4)" in text
    assert "vllm serve" in seen["said"]["plain"] and "tail scale" not in seen["said"]["plain"]


def test_an_import_takes_both_back(handed):
    folder, seen = handed
    assert seen["stored"] == [(2, WORDS), (2, WORDS)]
    assert f"tail scale {' '.join(WORDS)}: of config.json's block emoe" in seen["said"]["again"]
    k, emoe = block(folder / "third")
    assert (k, emoe["k_train"], emoe["tail_scale"]) == (2, 2, WORDS)
    assert "--moe-router-topk 2" in (folder / "second/model.args").read_text()
    assert seen["same"] == [True, True]  # plain top-k' on both sides, at a k' with a scale and at the k of training
    assert "k = 2 (8 in config.json)" in seen["seen"]


def test_transformers_uses_the_exported_scale_unless_told_otherwise(handed):
    from transformers import AutoModelForCausalLM

    folder, _ = handed
    model = AutoModelForCausalLM.from_pretrained(folder / "back").eval()
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain").eval()

    def logits(of: Any, *words: Any) -> torch.Tensor:
        set_active_experts(of, *words)
        with torch.no_grad():
            return of(hf_models.tokens(), use_cache=False).logits

    own = logits(model, 6)
    assert torch.equal(own, logits(model, 6, 0.3125))  # half way between 0.5 and 0.125
    assert torch.equal(own, logits(plain, 6, {4: 0.5, 8: 0.125}))
    assert torch.equal(logits(model, 6, 1), logits(plain, 6))
    assert (own - logits(plain, 6)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="tail_scale -1: must be one number, or numbers by k', finite and at least 0"):
        set_active_experts(model, 6, -1)
