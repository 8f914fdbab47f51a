"""The demo of instruction tuning: its chats are chats, its commands are commands of these tools. The whole runs in
`make demo-sft`."""

import argparse
import sys
from itertools import islice
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "examples"), str(REPO / "tools"), str(REPO / "benchmarks")]
import demo_sft  # noqa: E402
import preprocess_data  # noqa: E402

from megatron_emoe.data.chat_records import messages_of, schema_of  # noqa: E402


def steps() -> list:
    return [step for lanes in demo_sft.stages() for lane in lanes for step in lane]


def test_its_chats_ask_and_answer():
    found = list(islice(demo_sft.chats(), 50))
    for record in found:
        roles = [message["role"] for message in messages_of(record, schema_of(record))]
        assert roles == ["user", "assistant"] * 2
    first = found[0]["messages"]
    assert first[0]["content"].startswith("What does ") and first[3]["content"].startswith("It takes ")


def test_its_commands_are_commands_of_these_tools():
    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.settings.flag_files import expand
    from megatron_emoe.training.arguments import add_arguments

    of = {name: [step for step in steps() if step.script.endswith(name)] for name in ("preprocess_data.py", "emoe.py")}
    text, chats = (preprocess_data.parse_args(step.words) for step in of["preprocess_data.py"])
    assert not text.chat and chats.chat and chats.seq_length == demo_sft.LENGTH
    assert text.tokenizer_model == chats.tokenizer_model == str(demo_sft.HF)
    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    runs = {
        step.name: parser.parse_args(expand([word for word in step.words if "model.args" not in word]))
        for step in of["emoe.py"]
    }
    assert list(runs) == ["base", *demo_sft.METHODS]
    assert [run.sft for run in runs.values()] == [False, True, True, True]
    assert [run.emoe_selection for run in runs.values()] == ["topk", "topk", "coactivation", "prefix"]
    assert {run.load for run in list(runs.values())[1:]} == {runs["base"].save}
    sweeps = [step.words for step in steps() if step.script.endswith("sweep_k.py")]
    assert len(sweeps) == 4 and all(
        "--sft" in words and f"{demo_sft.OUT}/data/chats_heldout" in words for words in sweeps
    )
