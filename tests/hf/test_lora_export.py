"""Low-rank experts from an imported dense model through training to transformers: the same logits at every k'."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_emoe.hf.low_rank_model import add_low_rank_experts
from megatron_emoe.settings.lora_file import DESCRIPTION, TENSORS
from tests import hf_models
from tests.distributed import run_ranks
from tests.tiny import train

pytestmark = pytest.mark.slow

KS = (1, 2, 4, 6)
EXPERTS = {
    "plain": ["--emoe-selection", "coactivation", "--emoe-pool-k", "6"],
    "scales": [
        *("--emoe-selection", "prefix", "--emoe-k-schedule", "stratified", "--emoe-k-grid", "4", "6"),
        *("--emoe-budget-scales", "--emoe-tail-scale", "0.25", "--moe-router-pre-softmax"),
        *("--emoe-combine", "renormalize", "--emoe-lora-alpha", "5"),
    ],
}
RUN = (
    *("--emoe-lora-experts", "8", "--emoe-lora-rank", "3", "--moe-router-topk", "2", "--seq-length", "16"),
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--train-iters", "4", "--lr", "5e-2", "--mock-data"),
    *("--lr-decay-style", "constant", "--eval-iters", "0", "--save-interval", "4", "--tokenizer-type", "NullTokenizer"),
)


def trained(folder: Path, kind: str) -> None:
    """Import a tiny LLaMA, train experts on it, export them."""
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.settings.flag_files import expand

    hf_models.save("llama", folder / "hf", num_hidden_layers=3)
    import_model(folder / "hf", folder / "base", report=str, verify=None)
    run = [*expand([f"@{folder / 'base/model.args'}"]), *RUN, *EXPERTS[kind]]
    train([*run, "--pretrained-checkpoint", str(folder / "base"), "--save", str(folder / "out")])
    export_model(folder / "out", folder / "experts", hf_config=folder / "hf", report=str)


def logits_of(folder: Path) -> dict[int, Tensor]:
    """The trained Megatron model's, [B, S, V] at each k'."""
    from megatron.core.utils import unwrap_model

    from megatron_emoe.hf.one_process import evaluating
    from megatron_emoe.hf.verify import _load, random_tokens
    from megatron_emoe.routing.active_k import get_active_k

    tokens = random_tokens(128, sequences=4, length=16)
    places = torch.arange(16).expand_as(tokens)
    with evaluating(folder / "out", length=16, bf16=False, flags=[]) as args, torch.no_grad():
        model = unwrap_model(_load(args))
        found = {}
        for k in KS:
            with get_active_k().evaluating(k):
                found[k] = model(tokens, places, None)[..., :128].float()
    return found


@pytest.fixture(scope="module", params=list(EXPERTS))
def made(request: Any, tmp_path_factory: Any) -> tuple[Path, dict[int, Tensor]]:
    folder = tmp_path_factory.mktemp(request.param)
    run_ranks(trained, 1, folder, request.param)
    return folder, run_ranks(logits_of, 1, folder)[0]


def load(folder: Path) -> Any:
    from megatron_emoe.hf.verify import load_hf

    return load_hf(folder / "hf", torch.float32)


def test_transformers_gives_the_same_logits_at_every_k(made):
    from megatron_emoe import set_active_experts
    from megatron_emoe.hf.verify import random_tokens

    folder, expected = made
    model, tokens = load(folder), random_tokens(128, sequences=4, length=16)
    with torch.no_grad():
        base = model(tokens).logits
        add_low_rank_experts(model, folder / "experts")
        own = model(tokens).logits
        for k in KS:
            set_active_experts(model, k)
            found = model(tokens).logits
            assert torch.allclose(found, expected[k], rtol=1e-4, atol=1e-4), (found - expected[k]).abs().max()
            assert k != 2 or torch.equal(found, own)
    assert (base - own).abs().max() > 1e-2
    assert (expected[1] - expected[6]).abs().max() > 1e-2


def exported(folder: Path, **asked: Any) -> str:
    from megatron_emoe.hf.export_model import export_model

    with pytest.raises(ValueError) as error:
        export_model(folder / "out", folder / "again", hf_config=folder / "hf", report=str, **asked)
    return str(error.value)


def test_an_export_has_no_k(made):
    folder, _ = made
    assert run_ranks(asked_for_k, 1, folder)[0].startswith("--k 4: low-rank experts are exported without a k'")
    assert not (folder / "again").exists()


def asked_for_k(folder: Path) -> str:
    return exported(folder, k=4)


def changed(folder: Path, out: Path, change: Any) -> Path:
    """A copy of the export in which `change` has changed lora_moe.json."""
    shutil.copytree(folder / "experts", out)
    about = json.loads((out / DESCRIPTION).read_text())
    change(about)
    (out / DESCRIPTION).write_text(json.dumps(about))
    return out


BAD = {
    "k: 9; must be at most experts (8)": lambda about: about.update(k=9),
    "for a model of hidden_size 64, this one has 32": lambda about: about["base"].update(hidden_size=64),
    "schema_version: 2": lambda about: about.update(schema_version=2),
    "alpha: -1.0": lambda about: about.update(alpha=-1.0),
    "router.combine: 'other'": lambda about: about["router"].update(combine="other"),
}


@pytest.mark.parametrize("message", BAD)
def test_a_description_that_does_not_fit_is_refused(message, made, tmp_path):
    folder = changed(made[0], tmp_path / "experts", BAD[message])
    with pytest.raises(ValueError, match=re.escape(message)):
        add_low_rank_experts(load(made[0]), folder)


def test_another_base_damaged_files_and_a_second_time_are_refused(made, tmp_path):
    from megatron_emoe import set_active_experts

    folder, model = made[0] / "experts", load(made[0])
    with pytest.raises(ValueError, match="no such file"):
        add_low_rank_experts(model, tmp_path)
    torn = changed(made[0], tmp_path / "torn", lambda about: None)
    (torn / TENSORS).write_bytes((torn / TENSORS).read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{TENSORS}: cannot be read"):
        add_low_rank_experts(model, torn)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data[0, 3] += 0.5
    with pytest.raises(ValueError, match="trained on another base"):
        add_low_rank_experts(model, folder)
    weight.data[0, 3] -= 0.5
    add_low_rank_experts(model, folder)
    with pytest.raises(ValueError, match="has low-rank experts already"):
        add_low_rank_experts(model, folder)
    for k in (0, 9, [2, 4]):
        with pytest.raises(ValueError, match=r"^k' "):
            set_active_experts(model, k)
