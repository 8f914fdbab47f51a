"""Import and export return every bit, in every variant of every architecture; what an export refuses."""

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.hf.export_model import elastic_settings
from megatron_emoe.hf.served import served
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE
from tests import hf_models
from tests.distributed import run_ranks
from tests.hf_models import MODEL_TYPES

COMMON: list[dict[str, Any]] = [
    {},
    {"dtype": torch.bfloat16, "max_shard_size": "20KB", "num_experts": 6, "num_experts_per_tok": 3},
    {"dtype": torch.float16, "num_experts": 10, "vocab_size": 100},
]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "olmoe": [{"tied": True, "num_key_value_heads": 2}, {"save_original_format": False, "clip_qkv": 2.5}],
    "qwen2_moe": [
        {"tied": True, "num_key_value_heads": 1},
        {"mlp_only_layers": [1], "num_hidden_layers": 3},
        {"save_original_format": False, "decoder_sparse_step": 2, "num_hidden_layers": 4},
    ],
    "deepseek_v2": [{"first_k_dense_replace": 0, "tied": True}, {"n_shared_experts": 1, "save_original_format": False}],
    "ernie4_5_moe": [{"tied": False, "mtp": True}, {"num_key_value_heads": 4, "moe_layer_start_index": 0}],
}


def round_trips(model_type: str, folder: Path) -> list[dict[str, Any]]:
    """Import and export each variant; what differs, by name."""
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.safetensors_files import SafetensorsFolder

    found = []
    for number, options in enumerate(COMMON + VARIANTS[model_type]):
        hf, megatron, back = (folder / f"{name}{number}" for name in ("hf", "megatron", "back"))
        hf_models.save(model_type, hf, **options)
        import_model(hf, megatron, report=str)
        export_model(megatron, back, report=str)
        before, after = SafetensorsFolder(hf), SafetensorsFolder(back)
        ours, theirs = after.read(after.tensors), before.read(before.tensors)
        same = {n for n in ours.keys() & theirs.keys() if _bits(ours[n]) == _bits(theirs[n])}
        found.append(
            {
                "tensors": len(theirs),
                "distinct": len({_bits(tensor) for tensor in theirs.values()}),
                "differ": sorted((ours.keys() | theirs.keys()) - same),
                "stacked": "decoder.layers.input_layernorm.weight" in _keys(megatron)
                or "decoder.layers.self_attention.linear_qkv.weight" in _keys(megatron),
                "config": _differences(hf, back),
                "loads": _loads(back),
            }
        )
    return found


def _bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _keys(megatron: Path) -> set[str]:
    from megatron_emoe.hf.torch_dist import TorchDistReader

    return set(TorchDistReader(megatron / "release").tensors)


def _differences(hf: Path, back: Path) -> set[str]:
    """Keys of config.json that changed."""
    old, new = (json.loads((path / "config.json").read_text()) for path in (hf, back))
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}


def _loads(back: Path) -> bool:
    """Whether transformers finds every weight, in its place, and no other."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    wrong = {kind: names for kind, names in told.items() if names and kind != "unexpected_keys"}
    unexpected = [name for name in told["unexpected_keys"] if "mtp" not in name]
    return not wrong and not unexpected and model.config.emoe["k_train"] == model.config.num_experts_per_tok


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_untrained_model_comes_back_bit_by_bit(model_type, tmp_path):
    (found,) = run_ranks(round_trips, 1, model_type, tmp_path)
    for options, seen in zip(COMMON + VARIANTS[model_type], found, strict=True):
        assert seen["differ"] == [], options
        assert seen["distinct"] == seen["tensors"], options  # or a swap would not be seen
        assert seen["config"] == {"emoe"}, options
        assert seen["loads"], options
    dense = {"deepseek_v2": [0, 1, 2, 4], "ernie4_5_moe": [0, 1, 2, 3], "qwen2_moe": [4, 5]}.get(model_type, [])
    assert [n for n, seen in enumerate(found) if not seen["stacked"]] == dense  # both layouts were written and read


def export_in_ways(folder: Path) -> dict[str, Any]:
    """One small model exported with several settings; the messages where it is refused."""
    from megatron_emoe.hf import export_model as module
    from megatron_emoe.hf.import_model import import_model

    hf = hf_models.save("olmoe", folder / "hf", tokenizer=True)
    megatron = folder / "megatron"
    import_model(hf, megatron, report=str)
    said: list[str] = []
    module.export_model(megatron, folder / "k4", k=4, report=said.append)
    bare = Path(shutil.copytree(megatron, folder / "bare"))
    shutil.rmtree(bare / "hf")
    module.export_model(bare, folder / "named", hf_config=hf, report=str)

    def message(**changes: Any) -> str:
        before = sorted(folder.iterdir())
        with pytest.raises(ValueError) as caught:
            module.export_model(**{"megatron": megatron, "out": folder / "no"} | changes)
        assert sorted(folder.iterdir()) == before
        return str(caught.value).replace(str(folder), "TMP")

    def other(model_type: str, name: str, **options: Any) -> Path:
        return hf_models.save(model_type, folder / name, **options)

    refused = {
        "k": message(k=9),
        "folder": message(out=folder / "hf"),
        "step": message(step=7),
        "bare": message(megatron=bare),
        "shape": message(hf_config=other("olmoe", "wide", intermediate_size=24)),
        "epsilon": message(hf_config=other("olmoe", "epsilon", rms_norm_eps=1e-6)),
        "model": message(hf_config=other("qwen2_moe", "qwen")),
        "theta": message(
            hf_config=other("olmoe", "theta", rope_parameters={"rope_type": "default", "rope_theta": 500000})
        ),
        "normed": message(hf_config=other("olmoe", "normed", norm_topk_prob=True)),
        "tied": message(hf_config=other("olmoe", "tied", tied=True)),
    }
    stored = module.stored_args
    module.stored_args = lambda *args: Namespace(**vars(stored(*args)) | {"emoe_selection": "null-experts"})
    refused["null"] = message()
    module.stored_args = stored
    (megatron / "release/__1_0.distcp").unlink()
    refused["damaged"] = message()
    return {"said": said, "refused": refused}


@pytest.fixture(scope="module")
def ways(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ways")
    return folder, run_ranks(export_in_ways, 1, folder)[0]


def test_k_and_the_elastic_settings_are_written(ways):
    folder, _ = ways
    config = json.loads((folder / "k4/config.json").read_text())
    assert config["num_experts_per_tok"] == 4
    assert config["emoe"] == {
        "k_train": 2,
        "iteration": 0,
        "selection": "topk",
        "pool_k": None,
        "k_schedule": "constant",
        "k_min": None,
        "k_max": None,
        "evaluated_k": [],
        "tail_scale": None,
        "k_range": [1, 4],
        "k_per_layer": None,
    }


def test_the_serving_lines_name_key_and_k(ways):
    folder, seen = ways
    text = "\n".join(seen["said"])
    assert f"vllm serve {folder}/k4 --hf-overrides '{{\"num_experts_per_tok\": 4}}'" in text
    assert f'from_pretrained("{folder}/k4", num_experts_per_tok=4)' in text


def test_tokenizer_and_other_files_come_along(ways):
    folder, _ = ways
    for out in ("k4", "named"):
        assert (folder / out / "tokenizer.json").read_text() == (folder / "hf/tokenizer.json").read_text()
    assert (folder / "k4/generation_config.json").is_file()


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("k", r"--k 9: must lie in \[1, 8\], the number of experts"),
        ("folder", r"TMP/hf: is not empty; nothing is overwritten"),
        ("step", r"--megatron TMP/megatron: iter_0000007 is missing, although --ckpt-step names it"),
        ("bare", r"--megatron TMP/bare: has no folder hf .*--hf-config"),
        ("shape", r"--moe-ffn-hidden-size 16: the checkpoint was trained with it, TMP/wide/config\.json means 24"),
        ("epsilon", r"--norm-epsilon 1e-05: the checkpoint was trained with it, TMP/epsilon/config\.json means 1e-06"),
        ("model", r"the checkpoint was trained with it, TMP/qwen/config\.json means"),
        ("theta", r"--rotary-base 10000: the checkpoint was trained with it, TMP/theta/config\.json means 500000"),
        ("normed", r"--moe-router-pre-softmax True: the checkpoint was trained with it, TMP/normed/config\.json means"),
        ("tied", r"--untie-embeddings-and-output-weights True: .* TMP/tied/config\.json means False"),
        ("null", r"--emoe-selection null-experts: the checkpoint was trained with it, and in a Hugging Face model"),
        ("damaged", r"TMP/megatron/release: damaged"),
    ],
)
def test_what_an_export_refuses(ways, what, pattern):
    assert re.search(pattern, ways[1]["refused"][what]), ways[1]["refused"][what]


def interrupt_and_go_on(hf: Path, folder: Path) -> list[int]:
    """Kill an export before its third file, export again, and return how many chunks were read in each attempt."""
    from megatron_emoe.hf import export_model as module
    from megatron_emoe.hf.import_model import import_model

    import_model(hf, folder / "megatron", report=str)
    read, calls = module.TorchDistReader.read, []

    def read_until_killed(reader, places):
        calls.append(len(places))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(reader, places)

    module.TorchDistReader.read = read_until_killed
    with pytest.raises(KeyboardInterrupt):
        module.export_model(folder / "megatron", folder / "back", workers=1, report=str)
    assert not (folder / "back").exists()
    first = len(calls)
    module.export_model(folder / "megatron", folder / "back", workers=1, report=str)
    return [first, len(calls) - first]


def test_an_interrupted_export_goes_on_where_it_stopped(tmp_path):
    from safetensors.torch import load_file

    hf = hf_models.save("olmoe", tmp_path / "hf", num_hidden_layers=4)  # 6 groups
    (calls,) = run_ranks(interrupt_and_go_on, 1, hf, tmp_path)
    assert 3 <= calls[0] <= 6 and calls[1] < 6 and sum(calls) == 7  # the interrupted one, and no other, is read again
    after = {
        name: tensor for file in (tmp_path / "back").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    before = load_file(hf / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_was_trained_and_what_was_fitted_later(tmp_path):
    args = Namespace(moe_router_topk=2, emoe_selection="coactivation", emoe_pool_k=6, emoe_eval_k=[4, 2])
    settings = elastic_settings(args, Path("iter_0001000"))
    assert (settings["iteration"], settings["pool_k"], settings["evaluated_k"]) == (1000, 6, [2, 4])
    trained = Namespace(**vars(args), emoe_tail_scale=["4:0.5"])
    assert elastic_settings(trained, tmp_path)["tail_scale"] == ["4:0.5"]
    (tmp_path / TAIL_SCALE_FILE).write_text('{"tail_scale": {"6": 0.25}}')  # what was fitted later counts
    assert elastic_settings(trained, tmp_path)["tail_scale"] == ["6:0.25"]


def test_the_range_to_serve_is_what_was_trained_or_evaluated_and_twice_k_at_least():
    config = hf_models.config("olmoe", num_experts=32)

    def k_range(**emoe: Any) -> list[int]:
        args = Namespace(moe_router_topk=4, **emoe)
        return served(args, elastic_settings(args, Path("iter_0000001")), config)["k_range"]

    assert k_range() == [1, 8]
    assert k_range(emoe_pool_k=11, emoe_selection="coactivation") == [1, 11]
    assert k_range(emoe_k_schedule="default-or-larger") == [1, 12]
    assert k_range(emoe_k_schedule="uniform", emoe_k_min=2, emoe_k_max=10) == [1, 10]
    assert k_range(emoe_k_schedule="default-or-smaller", emoe_k_min=2) == [1, 8]
    assert k_range(emoe_eval_k=[16, 2]) == [1, 16]
    assert k_range(emoe_eval_k=[64]) == [1, 32]


def test_a_token_of_limited_groups_has_the_experts_of_its_groups():
    config = hf_models.config("deepseek_v2", n_group=4, topk_group=1)
    args = Namespace(moe_router_topk=2, emoe_eval_k=[8])
    assert served(args, elastic_settings(args, Path("iter_0000001")), config)["k_range"] == [1, 2]


@pytest.mark.parametrize(
    ("ks", "message"),
    [
        ([2], "--k-per-layer 2: 1 numbers; the model has 2 MoE layers"),
        ([2, 9], r"--k-per-layer 2,9: 9; must lie in \[1, 8\], the experts of a token"),
    ],
)
def test_a_k_per_layer_is_checked(ks, message):
    args, config = Namespace(moe_router_topk=2), hf_models.config("ernie4_5_moe")
    settings = elastic_settings(args, Path("iter_0000001"))
    assert served(args, settings, config, [2, 5]) == {"k_range": [1, 5], "k_per_layer": [2, 5]}
    with pytest.raises(ValueError, match=message):
        served(args, settings, config, ks)
