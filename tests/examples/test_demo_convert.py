"""The demo of conversion: its commands are commands of these tools, and its model loads (the whole runs in `make
demo-convert`)."""

import argparse
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "examples"), str(REPO / "tools")]
import convert_checkpoint  # noqa: E402
import demo_convert  # noqa: E402
import preprocess_data  # noqa: E402


def commands(script: str) -> list[list[str]]:
    """The words after `script` of every step that runs it."""
    found = []
    for step in demo_convert.steps():
        names = [Path(word).name for word in step.command]
        if script in names:
            found.append(step.command[names.index(script) + 1 :])
    return found


def test_the_converter_takes_its_commands():
    chosen = [convert_checkpoint.parser().parse_args(words) for words in commands("convert_checkpoint.py")]
    assert [verb.verb for verb in chosen] == ["import", "verify", "inspect", "export", "verify"]
    assert chosen[1].k == [2, 4, 8] and len(set(chosen[1].k)) == 3
    assert (chosen[0].out, chosen[3].out) == (chosen[1].megatron, chosen[4].hf)


def test_the_tokenizer_of_the_data_is_the_model_s():
    (words,) = commands("preprocess_data.py")
    chosen = preprocess_data.parse_args(words)
    assert chosen.tokenizer_model == str(demo_convert.HF)
    assert all(Path(path).exists() for path in chosen.input)


def test_the_training_flags_are_flags_and_elastic():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.training.arguments import add_arguments

    (words,) = commands("pretrain_emoe.py")
    assert words[0] == f"@{demo_convert.MEGATRON}/model.args"
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    chosen = parser.parse_args(words[1:])
    assert (chosen.load, chosen.save, chosen.finetune) == (str(demo_convert.MEGATRON), str(demo_convert.TRAINED), True)
    assert (chosen.emoe_selection, chosen.expert_model_parallel_size) == ("coactivation", 2)


def test_the_model_is_an_olmoe_with_a_tokenizer_of_real_text(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_emoe.hf.registry import read_config

    monkeypatch.setattr(demo_convert, "PACKAGES", "argparse.py json")
    demo_convert.build(tmp_path / "hf", demo_convert.SHAPE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "def main() -> None:\n    return self.parser"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(ids) < len(text) / 2
    config = read_config(tmp_path / "hf")
    assert (config.model_type, config.num_experts_per_tok, config.vocab_size) == ("olmoe", 4, len(tokenizer))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").config.num_experts == 16


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (" [2026] iteration       10/      40 | x: 1 | lm loss: 7.0E+00 | y", "iteration       10, lm loss: 7.0E+00"),
        (
            " validation loss at iteration 40 | k'=4: 5.7 | k'=8: 5.8",
            "validation loss at iteration 40 | k'=4: 5.7 | k'=8: 5.8",
        ),
        (" some other line", None),
    ],
)
def test_what_is_shown_of_training(line, shown):
    (step,) = [step for step in demo_convert.steps() if step.name == "train"]
    assert demo_convert.shown(step, line) == shown
