"""How to run a k' of a sweep: command lines for Megatron and for Hugging Face exports, and what stock software cannot.

Words only; nothing is started and no model is read.
"""

import json
import math
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_emoe.settings import flag_files
from megatron_emoe.settings.hf_folder import read_config_json
from megatron_emoe.settings.serving_plugin import serve_command
from megatron_emoe.settings.tail_scale import TailScale, tail_scale_words
from megatron_emoe.sweep.allocation import Allocation
from megatron_emoe.sweep.budget import name
from megatron_emoe.sweep.curve import SweepResult

K_KEYS = ("num_experts_per_tok", "moe_k")
"""The names of k in config.json, the second in ERNIE-4.5's (`k_key` of `megatron_emoe.hf.architecture`)."""

_TRANSFORMERS = 'AutoModelForCausalLM.from_pretrained("{model}", {key}={k})'
_HOOKS = "megatron_emoe.set_active_experts(model, {arguments})"


def tail_scale_at(result: SweepResult, k: int | Allocation) -> float:
    """a(k'): what the weights of the experts past the k of training were multiplied by; for a list, at its largest k'.

    1 where the sweep ran without a tail scale, and where no layer goes past k.
    """
    largest = k if isinstance(k, int) else max(k)
    if largest <= result.k_train or not result.tail_scale:
        return 1.0
    return TailScale(tuple(sorted((int(key), scale) for key, scale in result.tail_scale.items()))).at(largest)


def has_learned_scales(result: SweepResult) -> bool:
    """Whether the model has scales of its own for every k' but that of training, as its settings say."""
    return "--emoe-budget-scales" in (result.training or {})


def sweep_command(result: SweepResult, out: Path, ks: Sequence[Allocation] = (), more: str = "") -> str:
    """The command that adds cells to the sweep file `out`: the sweep's own, with these k' per layer and `more`."""
    flags = [*_own_flags(result, "--out", "--k-per-layer"), *shlex.split(more)]
    if "--layer-sensitivity" in flags and not _names(flags, "--k"):
        flags += ["--k", *map(str, _measured(result))]
    flags += ["--k-per-layer", *map(name, ks)] if ks else []
    return _command(result, [*flags, "--out", str(out)])


def held_out_command(result: SweepResult, k: int | Allocation) -> str:
    """The command that measures this k' alone again, as the sweep did, into a new file."""
    flags = _own_flags(result, "--out", "--k", "--k-per-layer", "--layer-sensitivity")
    flags += ["--k" if isinstance(k, int) else "--k-per-layer", name(k)]
    if result.tail_scale and not _names(flags, "--emoe-tail-scale"):
        flags += ["--emoe-tail-scale", *tail_words(result.tail_scale)]
    return _command(result, [*flags, "--out", f"k{name(k).replace(',', '-')}.json"])


def _command(result: SweepResult, flags: Sequence[str]) -> str:
    """Ranks are the fewest that the parallel layout needs; a result does not depend on the layout."""
    launcher = "python" if result.framework == "transformers" else f"torchrun --nproc-per-node {_ranks(flags)}"
    return f"{launcher} tools/sweep_k.py {shlex.join(flags)}"


def _own_flags(result: SweepResult, *dropped: str) -> list[str]:
    """The flags of the sweep's own command but `dropped`, each @FILE that can still be read replaced by its flags."""
    words = shlex.split(result.command)
    scripts = [index for index, word in enumerate(words) if Path(word).name == "sweep_k.py"]
    flags = [flag for word in words[scripts[-1] + 1 :] for flag in _expanded(word)] if scripts else _flags_of(result)
    for option in dropped:
        flags = _without(flags, option)
    return flags


def _expanded(word: str) -> list[str]:
    try:
        return flag_files.expand([word])
    except ValueError:
        return [word]


def _flags_of(result: SweepResult) -> list[str]:
    source = "--hf" if result.framework == "transformers" else "--load"
    data = ["--data-path", *result.data.path] if result.data.path else ["--mock-data"]
    return [source, result.checkpoint, *data, "--max-eval-tokens", str(result.data.tokens)]


def _without(flags: list[str], option: str) -> list[str]:
    """The words without an option and its values; a value starts with neither `--` nor the `@` of a flag file."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        if word.startswith(("--", "@")):
            dropping = word.split("=")[0] == option
        if not dropping:
            kept.append(word)
    return kept


def _names(flags: Sequence[str], option: str) -> bool:
    return any(word.split("=")[0] == option for word in flags)


def _measured(result: SweepResult) -> list[int]:
    """Every k' that has a cell, in one layer at least; the k of training where there is no cell."""
    ks = {k for cell in result.cells for k in ((cell.k,) if isinstance(cell.k, int) else cell.k)}
    return sorted(ks) or [result.k_train]


def tail_words(tail_scale: Mapping[str, float]) -> list[str]:
    """The words of --emoe-tail-scale for what a sweep file has."""
    table = {int(key): scale for key, scale in tail_scale.items()}
    return [f"{table[0]:g}"] if set(table) == {0} else tail_scale_words(table)


def _ranks(flags: Sequence[str]) -> int:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for size in ("tensor-model", "pipeline-model", "context", "expert-model", "expert-tensor"):
        parser.add_argument(f"--{size}-parallel-size", type=int)
    given = {key.removesuffix("_parallel_size"): n for key, n in vars(parser.parse_known_args(flags)[0]).items()}
    tensor = given["tensor_model"] or 1
    experts = (given["expert_model"] or 1) * (given["expert_tensor"] or tensor)
    return math.lcm(tensor * (given["context"] or 1), experts) * (given["pipeline_model"] or 1)


def hf_key(*folders: Path) -> str | None:
    """The name of k in the config.json of the first folder that has one with k in it; None if none has."""
    for folder in folders:
        try:
            config = read_config_json(folder)
        except ValueError:
            continue
        if found := [key for key in reversed(K_KEYS) if key in config]:
            return found[0]
    return None


def serving_lines(result: SweepResult, k: int | Allocation) -> list[str]:
    """How to run the checkpoint at this k': a line of words, then its command, for each way there is."""
    return [*_megatron_lines(result, k), *_hf_lines(result, k)]


def _megatron_lines(result: SweepResult, k: int | Allocation) -> list[str]:
    if result.framework == "transformers":
        return []
    return ["Megatron, held-out loss:", f"  {held_out_command(result, k)}"]


def _hf_lines(result: SweepResult, k: int | Allocation) -> list[str]:
    checkpoint = Path(result.checkpoint)
    exported = result.framework != "transformers"
    model, found = ("EXPORTED" if exported else result.checkpoint), hf_key(checkpoint, checkpoint / "hf")
    key = found or K_KEYS[0]
    lines = []
    if exported:
        lines += ["Hugging Face, for a checkpoint that was imported from there, after"]
        lines += [f"  tools/convert_checkpoint.py export --megatron {shlex.quote(result.checkpoint)} --out EXPORTED"]
    tail = tail_scale_at(result, k)
    if not isinstance(k, int) or tail != 1 or (has_learned_scales(result) and k != result.k_train):
        return [*lines, *_only_with_ours(result, k, tail, model)]
    named = "" if found else " (in ERNIE-4.5's config.json k is called moe_k)"
    lines += [f"vLLM and transformers{named}:"]
    lines += [f"  vllm serve {shlex.quote(model)} --hf-overrides {shlex.quote(json.dumps({key: k}))}"]
    return [*lines, "  " + _TRANSFORMERS.format(model=model, key=key, k=k)]


def _only_with_ours(result: SweepResult, k: int | Allocation, tail: float, model: str) -> list[str]:
    """What stock software cannot do, and what can. Our plugin takes the scales that the folder has, no others."""
    missing = ["one k' per layer"] if not isinstance(k, int) else []
    missing += [f"a tail scale (here {tail:g})"] if tail != 1 else []
    missing += ["learned scales"] if has_learned_scales(result) else []
    table = f", tail_scale={ {int(key): a for key, a in (result.tail_scale or {}).items()} }" if tail != 1 else ""
    arguments = f"{k if isinstance(k, int) else list(k)}{table}"
    return [
        f"vLLM and transformers as they are do not serve {' and '.join(missing)}: the loss above is not theirs.",
        "vLLM with the plugin in serving/, with the scales that the folder has:",
        f"  {serve_command(model, k)}",
        "transformers with this package:",
        "  " + _HOOKS.format(arguments=arguments),
    ]
