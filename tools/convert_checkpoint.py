"""Checkpoints between Hugging Face (safetensors) and Megatron (torch_dist), with proof that they compute the same.

    python tools/convert_checkpoint.py import  --hf DIR --out DIR
    python tools/convert_checkpoint.py verify  --hf DIR --megatron DIR --k 4 8 16
    python tools/convert_checkpoint.py export  --megatron DIR --out DIR
    python tools/convert_checkpoint.py inspect DIR
    python tools/convert_checkpoint.py grow    --hf DIR --out DIR --experts 2x

Imports and exports run on any machine, with a few layers in memory; docs/checkpoints.md says more.
"""

import argparse
import contextlib
import json
import logging
import shlex
import sys
import warnings
from functools import partial
from pathlib import Path

from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import MOST_WORKERS, a_path, copies, per_layer, share, whole_to
from megatron_emoe.settings.hf_folder import hf_folder
from megatron_emoe.settings.paths import check_folder, check_out
from megatron_emoe.settings.refusal import one_line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = command_line(__doc__)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_add_import, _add_export, _add_verify, _add_inspect, _add_grow):
        add(verbs)
    return top


def _add_import(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    verb = verbs.add_parser("import", help="Hugging Face -> Megatron")
    verb.add_argument("--hf", type=a_path, required=True, help="Folder with config.json and safetensors.")
    verb.add_argument("--out", type=a_path, required=True, help="Folder to make: release/, model.args, hf/.")
    verb.add_argument("--no-verify", action="store_true", help="Skip the comparison of every layer with transformers.")
    _add_workers(verb)
    return verb


def _add_export(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    verb = verbs.add_parser("export", help="Megatron -> Hugging Face")
    verb.add_argument("--megatron", type=a_path, required=True, help="Folder that training or an import made.")
    verb.add_argument("--out", type=a_path, required=True, help="Folder to make.")
    verb.add_argument("--k", type=int, help="Active experts to write into config.json. Default: k in training.")
    verb.add_argument(
        "--k-per-layer",
        type=per_layer,
        metavar="K,K,...",
        help="One k' for each MoE layer, noted in config.json for servers that can have it. Default: none.",
    )
    verb.add_argument("--ckpt-step", type=int, help="Iteration to export. Default: the newest.")
    verb.add_argument("--hf-config", type=a_path, help="Folder of the original model. Default: hf/ in --megatron.")
    verb.add_argument("--sweep", type=a_path, help="Result of tools/sweep_k.py, noted in config.json.")
    _add_workers(verb)
    return verb


def _add_workers(verb: argparse.ArgumentParser) -> None:
    text = "Threads; each holds one layer in memory. Default: 2."
    verb.add_argument("--workers", type=whole_to(MOST_WORKERS), default=2, help=text)


def _add_verify(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    verb = verbs.add_parser("verify", help="compare both models on the same tokens, at several k'")
    verb.add_argument("--hf", type=a_path, required=True, help="Folder with config.json and safetensors.")
    verb.add_argument("--megatron", type=a_path, required=True, help="Megatron checkpoint, as --load takes it.")
    verb.add_argument("--k", type=int, nargs="+", help="Numbers of active experts k'. Default: the model's.")
    verb.add_argument("--bf16", action="store_true", help="Run both models in bf16. Default: fp32.")
    verb.add_argument(
        "--text", type=a_path, help="Text to run on, through the tokenizer in --hf. Default: random tokens."
    )
    verb.add_argument("--json", type=a_path, help="File to write the comparison to.")
    verb.add_argument("--host-mode", action="store_true", help="Run on CPU even where CUDA is present.")
    verb.add_argument(
        "--megatron-flags",
        type=shlex.split,
        default=[],
        metavar="'FLAGS'",
        help="How Megatron is to run: '--transformer-impl local', say, on a GPU without Transformer Engine.",
    )
    return verb


def _add_inspect(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    verb = verbs.add_parser("inspect", help="what a checkpoint of either side is; reads headers only")
    verb.add_argument("folder", type=a_path, metavar="DIR")
    verb.add_argument("--json", action="store_true", help="Print JSON.")
    return verb


def _add_grow(verbs: argparse._SubParsersAction) -> argparse.ArgumentParser:
    verb = verbs.add_parser("grow", help="a Hugging Face model with every expert several times over")
    verb.add_argument("--hf", type=a_path, required=True, help="Folder with config.json and safetensors.")
    verb.add_argument("--out", type=a_path, required=True, help="Folder to make: a Hugging Face model.")
    verb.add_argument("--experts", type=copies, required=True, metavar="Nx", help="Copies of each expert: 2x, say.")
    text = "Active experts to write into config.json. Default: N times the model's, which changes nothing."
    verb.add_argument("--k", type=int, help=text)
    text = "Noise on all copies but the first, over the standard deviation of each matrix. Default: 0."
    verb.add_argument("--noise", type=share, default=0.0, help=text)
    verb.add_argument("--seed", type=whole_to(2**63 - 1), default=1234, help="Of the noise. Default: 1234.")
    _add_workers(verb)
    return verb


def run_grow(chosen: argparse.Namespace) -> None:
    from megatron_emoe.hf.grow import grow_model

    grow_model(
        chosen.hf,
        chosen.out,
        times=chosen.experts,
        k=chosen.k,
        noise=chosen.noise,
        seed=chosen.seed,
        workers=chosen.workers,
    )


def run_import(chosen: argparse.Namespace) -> None:
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.layer_check import check_layers

    import_model(chosen.hf, chosen.out, workers=chosen.workers, verify=None if chosen.no_verify else check_layers)


def run_export(chosen: argparse.Namespace) -> None:
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.sweep.exported import measured_in

    export_model(
        chosen.megatron,
        chosen.out,
        k=chosen.k,
        k_per_layer=chosen.k_per_layer,
        step=chosen.ckpt_step,
        hf_config=chosen.hf_config,
        measured=partial(measured_in, chosen.sweep) if chosen.sweep else None,
        workers=chosen.workers,
    )


def run_verify(chosen: argparse.Namespace) -> int:
    from megatron_emoe.hf.verify import text_tokens, verify

    tokens = text_tokens(chosen.hf, chosen.text) if chosen.text else None
    result = verify(
        chosen.hf, chosen.megatron, ks=chosen.k, tokens=tokens, bf16=chosen.bf16, flags=chosen.megatron_flags
    )
    if chosen.json:
        chosen.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0 if result.passed else 1


def run_inspect(chosen: argparse.Namespace) -> None:
    from megatron_emoe.hf.inspect_model import inspect

    found = inspect(chosen.folder)
    print(found.as_json() if chosen.json else found.as_text())


def _choose_device(chosen: argparse.Namespace) -> None:
    """Only a comparison of whole models uses a GPU. Before anything of Megatron is imported, if it is at all."""
    if chosen.verb == "inspect" and (chosen.folder / "config.json").is_file():
        return
    warnings.simplefilter("ignore")  # torch and the core say at import what they would have on a GPU
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from megatron_emoe.host import mode as host_mode

    if chosen.verb != "verify":
        host_mode.enable(force=True)
        return
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        host_mode.setup(["--host-mode"] if chosen.host_mode else [])


def _check(chosen: argparse.Namespace) -> None:
    """ValueError for what is plainly not there, before anything is imported."""
    if getattr(chosen, "hf", None) is not None:
        chosen.hf = hf_folder("--hf", chosen.hf)
    if getattr(chosen, "hf_config", None) is not None:
        chosen.hf_config = hf_folder("--hf-config", chosen.hf_config)
    if getattr(chosen, "megatron", None) is not None:
        check_folder("--megatron", chosen.megatron)
    if chosen.verb == "verify" and chosen.json is not None:
        check_out(chosen.json, "--json")
    if chosen.verb == "inspect" and not chosen.folder.is_dir():
        raise ValueError(f"{chosen.folder}: no such folder")


def main() -> int:
    """Exit status 0; 1: the models differ; 2: refused, with one message on stderr."""
    chosen = parser().parse_args()
    runs = {"import": run_import, "export": run_export, "verify": run_verify, "inspect": run_inspect, "grow": run_grow}
    run = runs[chosen.verb]
    try:
        _check(chosen)
        _choose_device(chosen)
        return run(chosen) or 0
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name} {chosen.verb}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = ": the same command goes on where it stopped" if chosen.verb in ("import", "export", "grow") else ""
        print(f"interrupted{goes_on}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
