"""What lm-eval's tasks are asked for: the flags of tools/eval_tasks.py. lm-eval itself takes seconds to import."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.paths import check_folder, check_out
from megatron_emoe.settings.result_file import check_label

PAPER_TASKS = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "gsm8k": "gsm8k",
    "hellaswag": "hellaswag",
    "humaneval": "humaneval",
    "nq_open": "nq_open",
    "triviaqa": "triviaqa",
    "winogrande": "winogrande",
    "mmlu": "mmlu",
}
"""The nine tasks of EMoE (arXiv 2509.21892), and the folder of each in lm-eval: reading all of lm-eval's 14,000 tasks
takes half a minute."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """The flags of tools/eval_tasks.py that both kinds of model share."""
    group = parser.add_argument_group("tasks")
    group.add_argument("--model", choices=["hf", "megatron"], required=True, help="What --load holds.")
    group.add_argument("--k", type=int, nargs="+", required=True, help="Numbers of active experts k' to evaluate.")
    group.add_argument(
        "--tasks", nargs="+", default=list(PAPER_TASKS), help=f"Tasks of lm-eval. Default: {' '.join(PAPER_TASKS)}."
    )
    group.add_argument("--include-path", type=a_path, help="Folder with more tasks, as YAML files.")
    group.add_argument("--num-fewshot", type=int, help="Examples in the prompt. Default: each task's own number.")
    group.add_argument("--limit", type=int, help="Documents of each task to use at most, for a first look.")
    group.add_argument("--max-length", type=int, help="Tokens that the model sees at most. Default: the model's own.")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="Run programs that the model writes (humaneval)."
    )
    group.add_argument("--out", type=a_path, required=True, help="Result file (JSON); finished cells in it are kept.")
    group.add_argument("--label", help="Name of the model in tables. Default: the name of the --load folder.")
    return parser


def add_hf_arguments(parser: ArgumentParser) -> ArgumentParser:
    """The flags of --model hf, which transformers runs."""
    group = add_arguments(parser).add_argument_group("model of transformers (--model hf)")
    group.add_argument("--load", type=a_path, required=True, help="Folder with config.json and safetensors.")
    group.add_argument("--micro-batch-size", type=int, default=8, help="Rows in one forward pass. Default: 8.")
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    group.add_argument("--host-mode", action="store_true", help="Run on CPU even where CUDA is present.")
    group.add_argument("--emoe-tail-scale", nargs="+", help="a(k'): one number, or pairs k':a.")
    return parser


def check_asked(args: Namespace) -> None:
    """ValueError with flag, value and rule for what can be refused before the model is known, and without lm-eval."""
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ValueError(f"--num-fewshot {args.num_fewshot}: must be at least 0")
    check_out(args.out)
    check_label("--label", args.label)
    if args.include_path is not None:
        check_folder("--include-path", args.include_path)
