"""The flag files of examples/models are the flags of the published configurations, and Megatron takes them."""

import sys
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from megatron.training.arguments import parse_args, validate_args
from transformers import AutoConfig
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from megatron_emoe.hf.architecture import experts_in, own_k
from megatron_emoe.hf.registry import architecture_of, architectures
from megatron_emoe.routing.transformer_config import elastic_config_from_args
from megatron_emoe.settings.flag_files import expand
from megatron_emoe.training.arguments import add_arguments

REPO = Path(__file__).resolve().parents[2]
CONFIGS = Path(__file__).parent / "configs"
FILES = sorted((REPO / "examples/models").glob("*.args"))
MARK = "# Training suggestions, no part of the model."

# How to run, for a machine without a GPU.
RUN = (
    "--seq-length 64 --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion"
).split()


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request) -> Path:
    return request.param


@pytest.fixture
def config(file):
    return AutoConfig.from_pretrained(CONFIGS / f"{file.stem}.json", trust_remote_code=False)


def flags_in(text: str, tmp_path: Path) -> dict[str, str | bool]:
    """Flag names (as Megatron's arguments) and values; True is a switch. A flag may stand there once."""
    part = tmp_path / "part.args"
    part.write_text(text)
    found: dict[str, str | bool] = {}
    name = ""
    for word in expand([f"@{part}"]):
        if word.startswith("--"):
            name = word.removeprefix("--").replace("-", "_")
            assert name not in found, f"{word} twice"
            found[name] = True
        else:
            assert found[name] is True, f"{name} has several values"
            found[name] = word
    return found


def test_there_is_a_file_for_every_configuration_and_architecture():
    assert [file.stem for file in FILES] == sorted(path.stem for path in CONFIGS.glob("*.json"))
    types = {AutoConfig.from_pretrained(path, trust_remote_code=False).model_type for path in CONFIGS.glob("*.json")}
    assert types == architectures().keys()


def test_the_file_is_the_configuration_flag_by_flag(file, config, tmp_path):
    model, mark, _ = file.read_text().partition(MARK)
    assert mark, "the file does not say where the model ends"
    written, expected = flags_in(model, tmp_path), architecture_of(config).flags(config)
    assert written.keys() == expected.keys()
    for name, value in expected.items():
        assert type(value)(written[name]) == value, name


def test_the_suggested_loss_weight_is_that_of_the_configuration(file, config, tmp_path):
    suggested = flags_in(file.read_text().partition(MARK)[2].partition("\n")[2], tmp_path)
    imported = architecture_of(config).balancing(config)
    if not getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_alpha", 0)):
        assert config.model_type in ("llama", "granitemoe")
        assert suggested == imported == {}
        return
    assert suggested.keys() == imported.keys() == {"moe_router_load_balancing_type", "moe_aux_loss_coeff"}
    assert suggested["moe_router_load_balancing_type"] == imported["moe_router_load_balancing_type"]
    weight = imported["moe_aux_loss_coeff"]
    assert float(suggested["moe_aux_loss_coeff"]) == weight
    if config.model_type.startswith("deepseek"):  # its own definition is Megatron's: per layer, counts divided by k
        assert imported == {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-3}
        assert (config.seq_aux, config.aux_loss_alpha) == (True, 1e-3)
        return
    # transformers averages over layers and counts all k choices: at balance alpha x k. Megatron: coefficient x layers.
    layers = sum(architecture_of(config).is_moe(config, layer) for layer in range(config.num_hidden_layers))
    assert weight == pytest.approx(config.router_aux_loss_coef * config.num_experts_per_tok / layers, rel=1e-3)


def test_a_configuration_without_a_loss_weight_suggests_none(config):
    config.router_aux_loss_coef = config.aux_loss_alpha = 0.0
    assert architecture_of(config).balancing(config) == {}


def test_the_conversion_of_loss_weights_holds():
    """alpha times transformers' loss over 3 equal layers is (alpha k / 3) times Megatron's loss, 3 times."""
    tokens, experts, k, layers, alpha = 50, 8, 3, 3, 0.01
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    theirs = alpha * load_balancing_loss_func((logits_TE,) * layers, experts, k)
    chosen = logits_TE.topk(k).indices.flatten().bincount(minlength=experts)
    one_layer = switch_load_balancing_loss_func(logits_TE.softmax(-1), chosen, tokens, k, experts, alpha * k / layers)
    assert layers * one_layer.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_megatron_takes_the_file(file, config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_emoe.py", *expand([f"@{file}", *RUN])])
    args = parse_args(add_arguments)
    validate_args(args)
    elastic = elastic_config_from_args(args)
    assert elastic.num_layers == config.num_hidden_layers
    assert (elastic.num_moe_experts or 0) == experts_in(config)
    assert not experts_in(config) or elastic.moe_router_topk == own_k(config)
    scale = getattr(config, "residual_multiplier", 1.0)
    assert elastic.layernorm_epsilon == pytest.approx(config.rms_norm_eps / scale**2)
    dense = [layer for layer, moe in enumerate(_frequency(elastic)) if not moe]
    assert dense == ([0] if config.model_type in ("deepseek_v2", "deepseek_v3", "ernie4_5_moe") else [])


def _frequency(elastic) -> list[int]:
    frequency = elastic.moe_layer_freq
    return frequency if isinstance(frequency, list) else [1] * elastic.num_layers
