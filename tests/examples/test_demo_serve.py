"""The demo of serving: its commands are commands of these tools, and what it asks the server for was promised (the
whole runs in `make demo-serve`, what it makes is tested by `make test-serve`)."""

import json
import sys
from pathlib import Path

import pytest

from megatron_emoe.settings.flag_files import expand
from megatron_emoe.sweep import curve as sweep
from tests.sweep_results import make_cell, make_result

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "examples"), str(REPO / "tools")]
import convert_checkpoint  # noqa: E402
import demo_serve  # noqa: E402
import pick_k  # noqa: E402
import preprocess_data  # noqa: E402
import running_server  # noqa: E402
import served_export  # noqa: E402

OUT = Path("/out")


def words_after(script: str) -> list[list[str]]:
    """Of every step that runs it."""
    found = []
    for step in served_export.steps(OUT):
        names = [Path(word).name for word in step.command]
        if script in names:
            found.append(step.command[names.index(script) + 1 :])
    return found


@pytest.mark.slow
def test_the_tools_take_its_commands():
    chosen = [convert_checkpoint.parser().parse_args(words) for words in words_after("convert_checkpoint.py")]
    assert [verb.verb for verb in chosen] == ["import", "export"] and chosen[1].out == OUT / "exported"
    (words,) = words_after("preprocess_data.py")
    data = preprocess_data.parse_args(words)
    assert (data.tokenizer_model, data.holdout) == (str(OUT / "hf"), 0.05)
    (words,) = words_after("pick_k.py")
    assert pick_k.parse_args(words).budgets == OUT / "budgets.json"


def test_it_is_trained_by_the_recipe():
    (words,) = words_after("pretrain_emoe.py")
    assert words[:2] == ["@/out/megatron/model.args", f"@{REPO}/examples/recipe.args"]
    assert "--emoe-budget-scales" in expand(words[1:])


def test_what_it_asks_for_is_swept():
    swept = served_export.sweep_words(OUT)
    ks = swept[swept.index("--k") + 1 : swept.index("--k-per-layer")]
    followed = set(demo_serve.FOLLOW.values())
    assert {str(k) for k in {*demo_serve.KS, *followed}} <= set(ks)
    assert served_export.SHAPE["hidden_size"] // served_export.SHAPE["num_attention_heads"] == 32


class Knowing(running_server.Server):
    """It gives every token a log-probability of minus its own number, divided by k'."""

    def __init__(self):
        pass

    def complete(self, prompt, length, **more):
        k = more["vllm_xargs"]["emoe_k"]
        others = {"logprob": -100.0}
        return {"prompt_logprobs": [None, *({str(t): {"logprob": -t / k}, "999": others} for t in prompt[1:])]}


def test_the_served_loss_is_over_the_tokens_that_count():
    sequences = [{"tokens": [9, 1, 2], "counts": [1, 1]}, {"tokens": [9, 6, 50], "counts": [1.0, 0.0]}]
    assert Knowing().loss(sequences, 2) == pytest.approx((1 + 2 + 6) / 3 / 2)


class Echo:
    """A server with the promised losses, off by a given difference at k' = 4."""

    def __init__(self, result, off):
        self.result, self.off = result, off

    def loss(self, sequences, k):
        assert sequences == ["s"]
        return sweep.loss_at(self.result, k) + (self.off if k == 4 else 0)


def test_the_table_has_both_losses_and_their_difference(tmp_path, capsys):
    result = sweep.with_digest(make_result("e", [make_cell(k, 2 + 1 / k) for k in demo_serve.KS]), "ab" * 32)
    sweep.save(result, tmp_path / "sweep.json")
    (tmp_path / "tokens.json").write_text(json.dumps({"digest": "ab" * 32, "sequences": ["s"]}))
    assert demo_serve.compare(Echo(result, -0.5), tmp_path) == pytest.approx(0.5)
    assert "| 4 | 2.250000 | 1.750000 | -5.0e-01 |" in capsys.readouterr().out
    (tmp_path / "tokens.json").write_text(json.dumps({"digest": "cd" * 32, "sequences": ["s"]}))
    with pytest.raises(AssertionError, match="other tokens"):
        demo_serve.compare(Echo(result, 0), tmp_path)
