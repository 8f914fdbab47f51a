"""Which flags a plan takes, and which it names as ones that it does not know."""

import pytest

from tests.distributed import REPO, run_ranks

TINY = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --vocab-size 100 --bf16 "
    "--max-position-embeddings 64 --swiglu --disable-bias-linear --num-experts 8 --moe-ffn-hidden-size 16 "
    "--hidden-dropout 0 "
)


def read(path: str, files: dict[str, str]) -> dict[str, str | None]:
    """What the planner says of each model file (name -> flags); None: nothing."""
    from pathlib import Path

    from megatron_emoe.plan.model import read_model

    said: dict[str, str | None] = {}
    for name, flags in files.items():
        file = Path(path) / "model.args"
        file.write_text(flags)
        try:
            read_model(str(file), None, None)
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    return said


UNKNOWN = {
    "--grad-reduce-in-bf16": "--grad-reduce-in-bf16: a plan does not know gradients in bf16",
    "--optimizer sgd": "--optimizer sgd: must be adam",
    "--optimizer muon": "--optimizer muon: must be adam",
    "--hidden-dropout 0.1": "--hidden-dropout 0.1: a plan does not know the masks of dropout",
    "--rampup-batch-size 8 8 100": "--rampup-batch-size [8, 8, 100]: a plan does not know a batch that grows",
    "--account-for-loss-in-pipeline-split": "a plan does not know stages split by flags",
    "--decoder-first-pipeline-num-layers 1": "a plan does not know stages split by flags",
    "--context-parallel-size 2": "--context-parallel-size 2: must be 1",
    "--emoe-train router": "--emoe-train router: must be all",
    "--emoe-selection top-p": "--emoe-selection top-p: E[k] depends on the data",
    "--moe-layer-freq [0,1]": "--moe-layer-freq [0, 1]: 2 entries; must be one for each of 4 layers",
    "--moe-layer-freq [0,1,1,1,1]": "--moe-layer-freq [0, 1, 1, 1, 1]: 5 entries; must be one for each of 4 layers",
    "--moe-layer-freq 0": "--moe-layer-freq 0: must be at least 1",
    "--fp8-format hybrid": "give --precision to the planner",
    "--use-precision-aware-optimizer": "give --optimizer-state to the planner",
    "--fp16": "are refused: ",
    "--max-position-embeddings abc": "argument --max-position-embeddings: invalid int value: 'abc'",
    "--hidden-size 0": "--hidden-size 0: must be at least 1",
    "--num-layers 0": "--num-layers 0: must be at least 1",
    "--heterogeneous-layers-config-path none.json": "none.json: a plan does not know layers that differ",
    "--emoe-k-schedule uniform": "--emoe-k-schedule uniform: needs --emoe-k-max",
}


@pytest.mark.slow
def test_what_no_formula_knows_is_named(tmp_path):
    files = {flags: TINY + flags for flags in UNKNOWN} | {"no bf16": TINY.replace("--bf16", "")}
    files |= {"no experts": TINY.replace("--num-experts 8", "")}
    rules = UNKNOWN | {"no bf16": "--bf16 is not among the flags", "no experts": "--num-experts is not among the flags"}
    said = run_ranks(read, 1, str(tmp_path), files)[0]
    assert {name: rule for name, rule in rules.items() if rule not in str(said[name])} == {}, said
    assert not [words for words in said.values() if str(words).endswith(": ")]


ON_GPUS = [
    f"@{REPO}/slurm/train.args",
    "--moe-permute-fusion --moe-router-fusion --moe-grouped-gemm",
    "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend deepep",
    "--tp-comm-overlap --overlap-param-gather --overlap-grad-reduce",
    "--moe-shared-expert-intermediate-size 32 --moe-shared-expert-overlap",
    "--transformer-impl transformer_engine --attention-backend flash",
    "--max-position-embeddings=32",
]


def test_kernels_and_overlap_are_not_seen(tmp_path):
    assert set(run_ranks(read, 1, str(tmp_path), {flags: TINY + flags for flags in ON_GPUS})[0].values()) == {None}


@pytest.mark.parametrize(("given", "length"), [("--max-position-embeddings=32", 32), ("", 64)])
def test_sequences_are_as_long_as_the_model_allows(given, length, tmp_path):
    assert run_ranks(seq_length, 1, str(tmp_path / "model.args"), TINY + given)[0] == length


def seq_length(path: str, flags: str) -> int:
    from pathlib import Path

    from megatron_emoe.plan.model import read_model

    Path(path).write_text(flags)
    return read_model(path, None, None).args.seq_length
