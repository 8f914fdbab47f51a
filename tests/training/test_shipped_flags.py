"""Every set of flags that is shipped starts: through the real parser and checks of a job, up to the built model.

As on a GPU machine with neither Transformer Engine nor Apex, where the model is really built (full width, two layers,
no memory), and with stand-ins for one or both, where flags alone can be tried.
"""

import contextlib
import io
import shlex
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import sweeps, tiny
from tests.distributed import REPO, run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="about a machine without it"),
]

FILES = (REPO / "examples" / "models").glob("*.args")
MODELS = sorted(path.stem for path in FILES if "--num-experts" in path.read_text())  # the planner's
PLAN = "--gpus 1 --gpu-memory 1000 --global-batch 8 --seq 4096 --print-flags".split()
TWO_LAYERS = "--num-layers 2 --moe-layer-freq ([0]*1+[1]*1) --mock-data --tokenizer-type NullTokenizer".split()
PRECISIONS = {"bf16": [], "fp8": ["--precision", "fp8"], "bf16 Adam": ["--optimizer-state", "bf16"]}
LOCAL = "Transformer Engine is not installed: Megatron-Core's local layers are used; --moe-grouped-gemm is left out"
UNFUSED = "--no-gradient-accumulation-fusion: Apex's fused_weight_gradient_mlp_cuda is not installed"


def shipped(model: str, precision: str, folder: Path) -> list[str]:
    """The command line of slurm/ for a model, with the layout that the planner prints, and two layers."""
    files = [
        f"@{REPO}/{name}" for name in (f"examples/models/{model}.args", "examples/recipe.args", "slurm/train.args")
    ]
    planned = ["--model", files[0][1:], "--recipe", files[1][1:], "--training", files[2][1:], *PLAN]
    layout = sweeps.run_tool("plan_job", *planned, *PRECISIONS[precision])
    assert layout.status in (0, None), layout.err
    return [*files, *shlex.split(layout.out), *TWO_LAYERS, "--load", str(folder), "--save", str(folder)]


def started(words: list[str], folder: Path, build: bool) -> tuple[str | None, list[str], int]:
    """What a job of one GPU with these flags is refused for, what it says, and the parameters of its model."""
    from megatron_emoe.plan import preflight
    from megatron_emoe.settings import command_line
    from megatron_emoe.settings.flag_files import expand

    preflight.shutil.disk_usage = lambda path: Namespace(free=1e15)
    command_line.SAID.clear()
    err, count = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            job = preflight.Job(nodes=1, processes=1, gpus=1, save=folder)
            args = preflight.check(job, expand([*words, "--exit-signal-handler"]))
            count = built(args) if build else 0
    except ValueError as error:
        return str(error), [], 0
    except SystemExit:
        return err.getvalue(), [], 0
    finally:
        sweeps._forget()
    return None, list(command_line.SAID), count


def built(args: Namespace) -> int:
    """Parameters of the model, as the training run builds it but without memory."""
    from megatron_emoe.plan.check import _build

    tiny.start()
    return sum(parameter.numel() for parameter in _build(args).parameters())


def without_both(folder: Path) -> dict[str, tuple]:
    answers = {model: started(shipped(model, "bf16", folder), folder, build=True) for model in MODELS}
    others = [name for name in PRECISIONS if name != "bf16"]
    return answers | {name: started(shipped(MODELS[0], name, folder), folder, build=False) for name in others}


def test_without_transformer_engine_and_apex_every_set_starts_or_names_the_flag_that_cannot(tmp_path):
    (answers,) = run_ranks(without_both, 1, tmp_path / "save")
    for model in MODELS:
        refused, said, parameters = answers[model]
        assert refused is None and said[0].startswith(LOCAL) and parameters > 1e8, (model, refused)
    assert answers["fp8"][0].startswith("--fp8-format hybrid: needs Transformer Engine, which is not installed")
    assert answers["bf16 Adam"][0].startswith("--use-precision-aware-optimizer: needs Transformer Engine, which is not")


def with_stand_ins(folder: Path) -> dict[str, tuple]:
    """Megatron looks for versions and for kernels when it reads flags: they are said to be there."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer import transformer_config

    from megatron_emoe.host import engine

    engine.is_there = lambda: True
    transformer_config.is_te_min_version = lambda *args, **kwargs: True
    rope_utils.fused_apply_rotary_pos_emb = print
    answers = {}
    for apex in (False, True):
        layers._grad_accum_fusion_available = apex
        for precision in PRECISIONS:
            words = shipped(MODELS[-1], precision, folder)
            answers[f"{precision}, Apex {apex}"] = started(words, folder, build=False)
    return answers


def test_with_transformer_engine_every_precision_starts_with_and_without_apex(tmp_path):
    (answers,) = run_ranks(with_stand_ins, 1, tmp_path / "save")
    assert {name: refused for name, (refused, *_) in answers.items() if refused} == {}
    for name, (_, said, _) in answers.items():
        assert any(line.startswith(UNFUSED) for line in said) == name.endswith("False"), (name, said)
