"""Whole sweeps for tests: tools/sweep_k.py as a user calls it, on the rank that it is run on, over random tokens."""

import contextlib
import io
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


def sweep_k(*words: str) -> Answer:
    """Run the tool in this process and leave no trace of it in Megatron's globals."""
    from megatron_emoe import host_mode

    sys.path.insert(0, str(REPO / "tools"))
    sys.argv = ["sweep_k.py", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if "sweep_k" in sys.modules:
                host_mode.start()  # as the script does when it is imported
            import sweep_k as tool

            status = tool.main()
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


def flags(data: Path, out: Path, **changes: object) -> list[str]:
    """Flags of a small sweep. changes: by name; True is a switch, a list several words, None leaves a flag out."""
    values = {
        "data_path": str(data),
        "out": str(out),
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
