"""The tools as a user calls them, on the rank that they are run on, and what a small sweep over random tokens takes."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.distributed import REPO

LENGTH = 16


class Answer(NamedTuple):
    """How a call ended, and what it wrote."""

    status: int | str | None
    out: str
    err: str


def run_tool(name: str, *words: object) -> Answer:
    """Run tools/<name>.py in this process, as a script, and leave no trace of it in Megatron's globals."""
    sys.argv = [f"{name}.py", *map(str, words)]
    status, out, err = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(REPO / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as leave:
            status = leave.code
        finally:
            _forget()
    return Answer(status, out.getvalue(), err.getvalue())


def _forget() -> None:
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import unset_global_variables

    unset_global_variables()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()


def write_tokens(prefix: Path, *, vocabulary: int = 128, documents: int = 24, seed: int = 5) -> Path:
    """Documents of random length and random tokens as .bin and .idx; returns the prefix."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for length in generator.integers(40, 120, documents):
        builder.add_document(generator.integers(0, vocabulary, length), [int(length)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def flags(data: Path, out: Path | None, **changes: object) -> list[str]:
    """Flags of a small sweep. changes: by name; True is a switch, a list several words, None leaves a flag out."""
    values = {
        "data_path": data,
        "out": out,
        "seq_length": LENGTH,
        "micro_batch_size": 16,
        "max_eval_tokens": 64 * LENGTH,
        "moe_token_dispatcher_type": "alltoall",
    }
    words: list[str] = []
    for name, value in (values | changes).items():
        if value is not None:
            words.append("--" + name.replace("_", "-"))
            words += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
    return words
