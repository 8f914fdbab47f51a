"""The architectures that came later, each on one rank: import, both comparisons, export, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import hf_models
from tests.distributed import run_ranks
from tests.hf_models import LATER_TYPES, VARIANTS

pytestmark = pytest.mark.slow

KS = [1, 2, 5, 8]  # the models have 8 experts and k = 2


def examine(model_type: str, folder: Path) -> dict[str, Any]:
    """Everything about one architecture: in fp32, and of the variant stored in bf16."""
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.inspect_model import inspect
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import random_tokens, verify

    tokens, found = random_tokens(128, sequences=2, length=32), {}
    stored_bf16 = {"dtype": torch.bfloat16, "max_shard_size": "30KB"}
    for name, options in (("plain", {}), ("variant", VARIANTS[model_type] | stored_bf16)):
        hf, megatron = folder / name / "hf", folder / name / "megatron"
        hf_models.save(model_type, hf, **options)
        import_model(hf, megatron, report=str)
        ks = KS if name == "plain" and model_type != "llama" else None
        found[name] = {
            "layers": check_layers(hf, megatron / "release", report=str),
            "whole": verify(hf, megatron, ks=ks, tokens=tokens, report=str),
        }
        export_model(megatron, folder / name / "back", report=str)
        found[name] |= compared(hf, folder / name / "back") | {"inspected": [inspect(hf), inspect(megatron)]}
    return found


def compared(hf: Path, back: Path) -> dict[str, Any]:
    """Tensors that an export gave back otherwise, keys of config.json that changed, and whether transformers loads."""
    from transformers import AutoModelForCausalLM

    from megatron_emoe.hf.safetensors_files import SafetensorsFolder

    before, after = SafetensorsFolder(hf), SafetensorsFolder(back)
    theirs, ours = before.read(before.tensors), after.read(after.tensors)
    same = {n for n in ours.keys() & theirs.keys() if ours[n].dtype == theirs[n].dtype and equal(ours[n], theirs[n])}
    old, new = (json.loads((path / "config.json").read_text()) for path in (hf, back))
    _, told = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    return {
        "differ": sorted((ours.keys() | theirs.keys()) - same),
        "distinct": len({tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in theirs.values()}),
        "tensors": len(theirs),
        "config": {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)},
        "lost": {kind: names for kind, names in told.items() if names},
    }


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("model_type", LATER_TYPES)
def test_import_comparisons_and_export(model_type, tmp_path):
    (found,) = run_ranks(examine, 1, model_type, tmp_path)
    dense = model_type == "llama"
    for name, seen in found.items():
        config = hf_models.config(model_type, **(VARIANTS[model_type] if name == "variant" else {}))
        assert seen["whole"].passed, seen["whole"].table()
        asked = [None] if dense else KS if name == "plain" else [config.num_experts_per_tok]
        assert [row.k for row in seen["whole"].rows] == asked
        for row in seen["whole"].rows:
            assert row.ours.max_difference <= 1e-5 and row.ours.other_sets == row.ties == 0
            assert row.compared == row.tokens and row.first_layer is None
        assert seen["layers"].largest.difference < 3e-6
        compared_at = {row.k for row in seen["layers"].rows} - {None}
        assert len(compared_at) == (0 if dense else 2)
        assert (seen["differ"], seen["lost"]) == ([], {})
        assert seen["distinct"] == seen["tensors"]  # or a swap would not be seen
        assert seen["config"] == (set() if dense else {"emoe"})
        theirs, ours = seen["inspected"]
        assert (theirs.parameters, theirs.active) == (ours.parameters, ours.active)
        assert "dense: no experts" in theirs.as_text() if dense else len(theirs.active) > 1
