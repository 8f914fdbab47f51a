"""Scores on lm-eval's tasks at several numbers of active experts k', of Megatron checkpoints and Hugging Face folders.

    torchrun --nproc-per-node 8 tools/eval_tasks.py --model megatron --load CKPT --k 4 8 12 --out tasks.json
    python tools/eval_tasks.py --model hf --load FOLDER --k 4 8 12 --tasks arc_easy gsm8k --out tasks.json

By default the nine tasks of the EMoE paper. The rows that reached the experts are counted for every cell and stored
with it. Cells already in the output are kept, so an interrupted run goes on where it stopped. docs/tasks.md says more.
"""

import argparse
import importlib.util
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def kind_of_model(words: list[str]) -> str | None:
    """The value of --model, before any library is imported; None: the command line's own parser will refuse it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--model")
    return parser.parse_known_args(words)[0].model


def header(args: argparse.Namespace, **model: Any) -> Any:
    """The result without cells."""
    from megatron_emoe.settings.flag_files import own_command
    from megatron_emoe.tasks.results import TasksResult
    from megatron_emoe.tasks.run import versions

    return TasksResult(
        label=args.label or Path(args.load).resolve().name,
        checkpoint=str(args.load),
        versions=versions(),
        command=own_command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **model,
    )


def run_hf(words: list[str]) -> None:
    """--model hf, in one process. ValueError: refused."""
    from megatron_emoe.tasks.on_transformers import run
    from megatron_emoe.tasks.run import add_arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--load", type=Path, required=True, help="Folder with config.json and safetensors.")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="Rows in one forward pass. Default: 8.")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--host-mode", action="store_true", help="Run on CPU even where CUDA is present.")
    parser.add_argument("--emoe-tail-scale", nargs="+", help="a(k'): one number, or pairs k':a.")
    run(parser.parse_args(words), header)


def run_megatron() -> None:
    """--model megatron, on every rank. ValueError: refused before a process group exists."""
    from megatron_emoe.host import mode as host_mode

    host_mode.start()
    from megatron_emoe.tasks.on_megatron import run

    run(header)


def main() -> int:
    """Exit status 0, or 2 after one message on stderr."""
    if importlib.util.find_spec("lm_eval") is None:
        print("eval_tasks.py: error: lm_eval is not installed: pip install 'megatron-emoe[eval]'", file=sys.stderr)
        return 2
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        run_megatron() if kind_of_model(sys.argv[1:]) == "megatron" else run_hf(sys.argv[1:])
    except ValueError as error:
        print(f"eval_tasks.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
