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
from typing import Any

from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.hf_folder import hf_folder, model_name
from megatron_emoe.settings.refusal import NoNumber, fail
from megatron_emoe.tasks.request import add_arguments, add_hf_arguments, check_asked
from megatron_emoe.training.first_look import look_at_evaluation


def kind_of_model(words: list[str]) -> str | None:
    """The value of --model, before any library is imported; None: the command line's own parser will refuse it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?")
    return parser.parse_known_args(words)[0].model


def header(args: argparse.Namespace, **model: Any) -> Any:
    """The result without cells."""
    from megatron_emoe.tasks.results import TasksResult
    from megatron_emoe.tasks.run import versions

    return TasksResult(
        label=args.label or model_name(args.load),
        checkpoint=str(args.load),
        versions=versions(),
        command=flag_files.own_command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **model,
    )


def run_hf(words: list[str]) -> None:
    """--model hf, in one process. ValueError: refused."""
    args = look_at_hf(words)
    from megatron_emoe.tasks.on_transformers import run

    run(args, header)


def look_at_hf(words: list[str]) -> argparse.Namespace:
    """The command line of --model hf, checked as far as it goes without lm-eval. ValueError: refused."""
    parser = command_line(__doc__, epilog="Of --model megatron: eval_tasks.py --model megatron --help.")
    add_hf_arguments(parser)
    if not {"-h", "--help", "--version"} & set(words):
        demand_lm_eval()
    args = parser.parse_args(words)
    check_asked(args)
    args.load = hf_folder("--load", args.load)
    return args


def run_megatron() -> None:
    """--model megatron, on every rank. ValueError: refused before a process group exists."""
    look_at_evaluation(__doc__, add_arguments, check_asked)
    demand_lm_eval()
    host_mode.start()
    from megatron_emoe.tasks.on_megatron import run

    run(header)


def demand_lm_eval() -> None:
    """ValueError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install 'megatron-emoe[eval]'")


def main() -> int:
    """Exit status 0; after one message on stderr 2, or 1 where the model gave no numbers."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        words = flag_files.expand(sys.argv[1:])
        run_megatron() if kind_of_model(words) == "megatron" else run_hf(words)
    except ValueError as error:
        fail(error)
    except NoNumber as error:
        fail(error, status=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
