"""The command line: help, what is refused before anything is written, and which k wins over a checkpoint's."""

import argparse
import re
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.training import arguments
from tests.distributed import torchrun
from tests.tiny import flags

# What host mode adds, where these tests do not enter it: they only read the command line.
WITHOUT_A_GPU = {
    "transformer_impl": "local",
    "no_gradient_accumulation_fusion": True,
    "no_persist_layer_norm": True,
    "no_rope_fusion": True,
}
COACTIVATION = {"emoe_selection": "coactivation", "emoe_pool_k": 6}
WRITING = {"save_interval": 1}


@pytest.fixture
def run(monkeypatch):
    """A function that parses a tiny run's command line, as pretrain_emoe.py does, and returns its namespace."""
    globals_set = []
    monkeypatch.setattr(arguments, "set_global_variables", globals_set.append)

    def parse(*words: str, add_more=lambda parser: parser, **changes) -> Namespace:
        line = flags(**WITHOUT_A_GPU | changes)
        monkeypatch.setattr(sys, "argv", ["/somewhere/pretrain_emoe.py", *line, *words])
        args = arguments.parse(add_more)
        assert globals_set.pop() is args  # Megatron's globals get what was checked
        return args

    return parse


@pytest.fixture
def error_of(run, capsys, tmp_path):
    """A function that expects a run to be refused, and returns its one line on stderr without the program's name.

    Nothing may be written: the run's folders must not come into being.
    """

    def refuse(*words: str, **changes) -> str:
        with pytest.raises(SystemExit) as left:
            run(*words, **WRITING | {"tensorboard_dir": f"{tmp_path}/log", "save": f"{tmp_path}/save"} | changes)
        assert left.value.code == 2
        assert not (tmp_path / "log").exists() and not (tmp_path / "save").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("pretrain_emoe.py: error: ")
        return line.removeprefix("pretrain_emoe.py: error: ")

    return refuse


# Flags.


def test_help_has_the_group_with_every_flag(run, capsys):
    with pytest.raises(SystemExit) as left:
        run("--help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    group = re.search(r"^elastic MoE:\n(.*?)^\S", text, flags=re.MULTILINE | re.DOTALL)
    assert group is not None
    for field in fields(ElasticConfig):
        assert f"\n  --{field.name.replace('_', '-')} " in "\n" + group[1]
    assert "host mode:" in text


def test_help_is_said_once(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        run("--help")
    assert left.value.code == 0
    assert capsys.readouterr().out == ""


def test_flags_reach_the_namespace(run):
    args = run(**COACTIVATION, emoe_eval_k=[1, 4], emoe_hr_loss_coeff=0.01, emoe_pool_fixed=True, eval_iters=1)
    assert (args.emoe_selection, args.emoe_pool_k, args.emoe_eval_k) == ("coactivation", 6, [1, 4])
    assert (args.emoe_hr_loss_coeff, args.emoe_pool_fixed) == (0.01, True)
    assert args.padded_vocab_size is None or args.padded_vocab_size > 0  # Megatron's own flags were completed
    assert args.data_parallel_size == 1


def test_what_is_in_force_is_said_in_one_line(run, capsys):
    run("--emoe-pool-k", "6", "--emoe-selection", "prefix", "--emoe-selection", "coactivation")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("elastic settings")]
    assert said == ["elastic settings: --emoe-selection coactivation (not prefix) --emoe-pool-k 6"]


def test_another_entry_point_adds_flags(run):
    def add_depth(parser: ArgumentParser) -> ArgumentParser:
        parser.add_argument("--depth", type=int)
        return parser

    assert run("--depth", "3", add_more=add_depth).depth == 3


# Refusals: one line on stderr, status 2, nothing written.

REFUSED = {
    "elastic setting": (COACTIVATION | {"emoe_pool_k": 9}, "--emoe-pool-k 9: must not exceed --num-experts 8"),
    "k of the model": ({"moe_router_topk": 9}, "--moe-router-topk 9: must not exceed --num-experts 8"),
    "no experts": (
        {"num_experts": None, "moe_ffn_hidden_size": None},
        "--num-experts is not given: an elastic mixture of experts needs experts",
    ),
    "two features": (
        COACTIVATION | {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0},
        "--emoe-selection coactivation cannot be combined with --moe-router-load-balancing-type sinkhorn: "
        "it chooses the experts itself",
    ),
    "settings in a file": (
        {"yaml_cfg": "/no/such/file"},
        "--yaml-cfg: not supported, the core would ignore every flag; give the settings as flags",
    ),
    "own layers": (
        {"spec": ["some.module", "some_spec"]},
        "--spec ['some.module', 'some_spec']: it brings its own layers, which are not elastic",
    ),
    "several validation sets": (
        {"emoe_eval_k": 4, "multiple_validation_sets": True, "full_validation": True, "eval_iters": None},
        "--emoe-eval-k cannot be combined with --multiple-validation-sets: give one validation set",
    ),
    "load": ({"load": "/no/such/folder"}, "--load /no/such/folder: no such folder"),
    "checkpoint's flags without a checkpoint": (
        {"use_checkpoint_args": True},
        "--use-checkpoint-args needs --load, which is not given",
    ),
    "rows of the embedding": ({"padded_vocab_size": 8}, "--padded-vocab-size 8: the tokenizer has 96 ids"),
    "warm-up from above": ({"lr_warmup_init": 0.5}, "--lr-warmup-init 0.5: must not exceed --lr 0.005"),
    "one expert alone": (
        {"moe_apply_probs_on_input": True},
        "--moe-apply-probs-on-input: needs --moe-router-topk 1, not 2",
    ),
    "a list without its end": (
        {"moe_layer_freq": "[1"},
        "--moe-layer-freq [1: not readable (SyntaxError: '[' was never closed (<string>, line 1))",
    ),
    "a signal by its number": ({"exit_signal": 15}, "--exit-signal 15: not readable (KeyError: '15')"),
    "a ramp of steps": (
        {"rampup_batch_size": [2, 2, 16]},
        "--rampup-batch-size 2 2 16: needs --train-samples in place of --train-iters, as steps have no fixed batch",
    ),
    "draws without a gradient": (
        {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-smaller", "emoe_k_min": 1}
        | {"moe_router_pre_softmax": None},
        "--emoe-k-min 1: must be at least 2 here; the weight of one expert alone is always 1, so routers get no "
        "gradient from it: keep the scores as weights (--moe-router-pre-softmax, --emoe-combine raw), or accept it "
        "with --emoe-gradient-check off",
    ),
    "finetune": ({"finetune": True}, "--finetune is given without --load: there is nothing to continue from"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(error_of, changes, message):
    assert error_of(**changes) == message


def test_a_rule_of_the_core_is_one_line_too(error_of):
    # --seq-length must be at most --max-position-embeddings: an assertion with a message. The other has none.
    message = "max_position_embeddings (16) must be greater than or equal to seq_length (32)."
    assert error_of(seq_length=32) == message
    line = error_of(save_interval=None)
    assert re.fullmatch(r"--save-interval is not given, and Megatron demands it here \(arguments\.py, line \d+\)", line)


def test_data_is_checked(error_of):
    assert error_of(mock_data=None, data_path="/no/such/data").startswith(
        "--data-path: /no/such/data.bin does not exist"
    )


def test_a_damaged_tracker_is_an_error_under_use_checkpoint_args(error_of, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("forty")
    rule = "holds 'forty', which is neither a number nor 'release'"
    message = f"--load {tmp_path}: latest_checkpointed_iteration.txt {rule}"
    assert error_of(load=str(tmp_path), use_checkpoint_args=True) == message
    assert error_of(load=str(tmp_path)) == message


def test_the_first_rank_of_another_machine_says_what_is_wrong_there(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        run(**COACTIVATION | {"emoe_pool_k": 9})
    assert left.value.code == 2
    assert "--emoe-pool-k 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--emoe-pool 6", "unrecognized arguments: --emoe-pool 6; did you mean --emoe-pool-k?"),  # no abbreviations
        ("--num-layer 6", "unrecognized arguments: --num-layer 6; did you mean --num-layers?"),
        ("--xyzzy", "unrecognized arguments: --xyzzy"),
        ("--num-layers six", "--num-layers six: must be a whole number"),
    ],
)
def test_a_mistyped_flag_is_one_line(error_of, words, message):
    """Also of Megatron's flags, whose parser would print pages of usage first, on every rank."""
    assert error_of(*words.split()) == message


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    # Two ranks: one line, status 2 on both, and no folder.
    folders = {"tensorboard_dir": f"{tmp_path}/log", "save": f"{tmp_path}/save"}
    bad = flags(**COACTIVATION | WRITING | folders | {"emoe_pool_k": 9})
    ended = torchrun(2, "pretrain_emoe.py", *bad, check=False, timeout=300)
    assert ended.returncode != 0
    line = "pretrain_emoe.py: error: --emoe-pool-k 9: must not exceed --num-experts 8\n"
    assert ended.stdout.startswith(line) or f"\n{line}" in ended.stdout
    report = ended.stdout.partition("Root Cause")[2]  # of torchrun, at its end
    assert f"traceback : {line}" in report and ended.stdout.count(line) == 2
    assert "exitcode  : 2" in ended.stdout
    assert 'pretrain_emoe.py", line' not in ended.stdout  # no traceback of ours; torchrun adds its own
    assert list(tmp_path.iterdir()) == []


# A checkpoint's k and the one asked for.


def parser_of_k() -> ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--moe-router-topk", type=int, default=2)
    parser.add_argument("--num-experts", type=int, default=None)
    return parser


@pytest.mark.parametrize(
    ("line", "given"),
    [
        ("", {}),
        ("--moe-router-topk 2", {"moe_router_topk": 2}),  # the default, but asked for
        ("--moe-router-topk=4", {"moe_router_topk": 4}),
        ("--moe-router-topk 4 --num-experts 8 --moe-router-topk 6", {"moe_router_topk": 6, "num_experts": 8}),
    ],
)
def test_what_stands_on_the_command_line(monkeypatch, line, given):
    monkeypatch.setattr(sys, "argv", ["pretrain_emoe.py", *line.split()])
    assert arguments._given(parser_of_k()) == given


def test_the_k_asked_for_wins_over_the_stored_one(capsys):
    args = Namespace(moe_router_topk=2)  # as the core leaves it: the checkpoint's
    arguments._keep_asked_k(args, {"moe_router_topk": 4})
    assert args.moe_router_topk == 4
    said = "--moe-router-topk 4 as asked, although the checkpoint was saved with 2\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("given", [{}, {"moe_router_topk": 2}])
def test_nothing_is_said_where_nothing_differs(capsys, given):
    args = Namespace(moe_router_topk=2)
    arguments._keep_asked_k(args, given)
    assert args.moe_router_topk == 2
    assert capsys.readouterr().out == ""


def test_use_checkpoint_args_keeps_the_k_asked_for(run, monkeypatch, tmp_path):
    # The core's loader forces the stored k, 2, on the namespace. --finetune: a run that goes on may not change k.
    stored = run(moe_router_topk=2)

    def load(args: Namespace) -> Namespace:
        args.moe_router_topk = stored.moe_router_topk
        return args

    monkeypatch.setattr(arguments, "load_args_from_checkpoint", load)
    monkeypatch.setattr("megatron_emoe.model.checkpoint.stored_args", lambda path, source, **_: stored)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    Path(tmp_path / "iter_0000040").mkdir()
    loading = {"load": str(tmp_path), "use_checkpoint_args": True, "finetune": True}
    assert run(**loading | {"moe_router_topk": 4}).moe_router_topk == 4
    assert run(**loading | {"moe_router_topk": None}).moe_router_topk == 2


# A tool that evaluates a checkpoint.


def test_evaluation_takes_the_model_from_the_checkpoint(run, monkeypatch, tmp_path):
    stored = run(**COACTIVATION, num_layers=3, qk_layernorm=True)
    monkeypatch.setattr(arguments, "locate", lambda folder, step: Path(folder))
    monkeypatch.setattr(arguments, "stored_args", lambda path, **_: stored)
    args = evaluate(monkeypatch, tmp_path, "--norm-epsilon", "0.5")
    assert (args.num_layers, args.num_experts, args.hidden_size) == (3, 8, 32)
    assert (args.qk_layernorm, args.emoe_selection, args.emoe_pool_k) == (True, "coactivation", 6)
    assert args.layernorm_epsilon == 0.5  # as asked, not as stored
    assert args.skip_train is True  # fixed by the tool


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--moe-router-topk 4", "--moe-router-topk 4: {} 2; leave the flag out (--k asks for other numbers of active"),
        ("--hidden-size 64", "--hidden-size 64: {} 32; leave the flag out\n"),
        ("--qk-layernorm", "--qk-layernorm True: {} False; leave the flag out\n"),
        ("--moe-shared-expert-intermediate-size 8", "--moe-shared-expert-intermediate-size 8: {} None; leave"),
        ("--emoe-clip-qkv 3", "--emoe-clip-qkv 3.0: {} None; leave the flag out\n"),
    ],
)
def test_an_evaluation_cannot_ask_for_another_model(run, monkeypatch, capsys, tmp_path, words, message):
    stored = run(**COACTIVATION, num_layers=3)
    monkeypatch.setattr(arguments, "locate", lambda folder, step: Path(folder))
    monkeypatch.setattr(arguments, "stored_args", lambda path, **_: stored)
    with pytest.raises(SystemExit) as left:
        evaluate(monkeypatch, tmp_path, *words.split())
    assert left.value.code == 2
    assert f"sweep_k.py: error: {message.format(f'the model in --load {tmp_path} has')}" in capsys.readouterr().err
    same = evaluate(monkeypatch, tmp_path, "--moe-router-topk", "2", "--hidden-size", "32")  # what the model has
    assert same.moe_router_topk == 2


def evaluate(monkeypatch, folder: Path, *words: str) -> Namespace:
    given = ["--load", str(folder), "--mock-data", "--micro-batch-size", "1", *words]
    local = flags(**dict.fromkeys(flags_of_the_model(), None) | WITHOUT_A_GPU)
    monkeypatch.setattr(sys, "argv", ["sweep_k.py", *local, *given])
    return arguments.parse_evaluation(lambda parser: parser, skip_train=True)


def flags_of_the_model() -> tuple[str, ...]:
    return ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_experts", "moe_ffn_hidden_size")


def test_evaluation_needs_a_checkpoint(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep_k.py"])
    with pytest.raises(SystemExit) as left:
        arguments.parse_evaluation(lambda parser: parser)
    assert left.value.code == 2
    assert capsys.readouterr().err == "sweep_k.py: error: --load is not given: which checkpoint?\n"
