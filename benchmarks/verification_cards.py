"""The results on the verification cards (docs/cards): tiny models of every architecture, converted and compared.

    python benchmarks/verification_cards.py              # all cards; or the names of some

Each architecture is built by transformers with random weights in two shapes (tests/hf_models.py), imported, checked
layer by layer, compared as a whole at several k' in fp32 and in bf16, and exported. The results replace the block
between the marks of the card; the rest of it is written by hand.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
CARDS = REPO / "docs/cards"
BEGIN, END = "<!-- results: benchmarks/verification_cards.py -->\n", "<!-- end of results -->\n"
KS = [1, 2, 5, 8]
BOUNDS = """Bounds. Layers: 1e-5. Whole models, fp32: max |dlogit| 1e-5 or four times transformers' own rounding noise,
KL 1e-10 or sixteen times its; routed sets equal but for ties. In bf16: KL 3e-2 and 90 % of the routed sets."""
CARD_OF = {
    "olmoe": "olmoe_1b_7b",
    "qwen2_moe": "qwen1_5_moe_a2_7b",
    "deepseek_v2": "deepseek_v2_lite",
    "ernie4_5_moe": "ernie4_5_21b_a3b",
    "llama": "llama_3_2_1b",
    "qwen3_moe": "qwen3_30b_a3b",
    "mixtral": "mixtral_8x7b",
    "deepseek_v3": "moonlight_16b_a3b",
    "granitemoe": "granite_3_0_1b_a400m",
}
DENSE = ("llama",)
SAYS = {  # of hf_models.VARIANTS, the second model of each architecture
    "olmoe": "6 experts, k = 3, grouped queries, q, k and v clamped at 0.7, tied embeddings",
    "qwen2_moe": "10 experts, k = 4, one key head, tied embeddings",
    "deepseek_v2": "6 experts, one shared, no dense layer, tied embeddings",
    "ernie4_5_moe": "10 experts, k = 6, no grouped queries, untied embeddings",
    "llama": "heads of 16, no grouped queries, no rotary scaling, tied embeddings",
    "qwen3_moe": "10 experts, k = 4, one key head, tied embeddings",
    "mixtral": "6 experts, k = 3, no grouped queries, tied embeddings",
    "deepseek_v3": "6 experts, one shared, no dense layer, tied embeddings",
    "granitemoe": "6 experts, k = 3, residual multiplier 1.5, tied embeddings",
}


@dataclass(frozen=True)
class Case:
    """One tiny model: how it is built, at which k' and in which types it is compared."""

    name: str
    options: dict[str, Any]
    ks: list[int] | None = None
    bf16: bool = False


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("names", nargs="*", metavar="ARCHITECTURE", help=", ".join(CARD_OF))
    chosen = options.parse_args().names or list(CARD_OF)
    if unknown := set(chosen) - CARD_OF.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: no such architecture; there are {', '.join(CARD_OF)}")
    _prepare()
    for model_type in chosen:
        card = CARDS / f"{CARD_OF[model_type]}.md"
        with tempfile.TemporaryDirectory() as folder:
            card.write_text(with_results(card.read_text(), results(model_type, Path(folder))))
        print(f"written: {card}")


def with_results(card: str, text: str) -> str:
    """The card with new results between its marks."""
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError("the card has no place for results")
    return before + begin + text + end + after


def _prepare() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(REPO))
    from megatron_emoe.host import mode as host_mode

    host_mode.enable(force=True)


def results(model_type: str, folder: Path) -> str:
    """Convert and compare; the block as Markdown."""
    import torch

    from tests import hf_models

    dense = model_type in DENSE
    cases = [
        Case("plain", {}, None if dense else KS),
        Case(SAYS[model_type], hf_models.VARIANTS[model_type]),
        Case("plain, stored in bf16", {"dtype": torch.bfloat16}, None if dense else [2, 8], bf16=True),
    ]
    rows = [line for number, case in enumerate(cases) for line in compare(model_type, case, folder / str(number))]
    versions = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "transformers", "torch"))
    return "\n".join(
        [
            f"{date.today()}, CPU (host mode), {versions}.",
            "",
            BOUNDS,
            "",
            "| model | compared | result |",
            "| --- | --- | --- |",
            *rows,
            "",
        ]
    )


def compare(model_type: str, case: Case, folder: Path) -> list[str]:
    """Rows of one tiny model."""
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.layer_check import check_layers
    from megatron_emoe.hf.verify import verify
    from tests import hf_models

    quiet: dict[str, Any] = {"report": lambda line: None}
    hf = hf_models.save(model_type, folder / "hf", **case.options)
    import_model(hf, folder / "megatron", **quiet)
    layers = check_layers(hf, folder / "megatron" / "release", **quiet)
    at = "" if model_type in DENSE else ", at k and with all experts"
    rows = [
        f"| {case.name} | each layer on the same hidden states{at}, fp32 | largest relative "
        f"difference {layers.largest.difference:.1e} |"
    ]
    reports = [verify(hf, folder / "megatron", ks=case.ks, **quiet)]
    reports += [verify(hf, folder / "megatron", ks=case.ks, bf16=True, **quiet)] if case.bf16 else []
    rows += [verified(case, report, row) for report in reports for row in report.rows]
    return [*rows, f"| {case.name} | tensors after import and export | {round_trip(hf, folder)} |"]


def verified(case: Case, report: Any, row: Any) -> str:
    """One k' of a comparison of whole models."""
    logits = f"max \\|dlogit\\| {row.ours.max_difference:.1e}, " if report.dtype == "fp32" else ""
    sets = "" if row.k is None else f", {1 - row.ours.other_sets:.2%} of routed sets equal"
    verdict = "; ".join(row.failures) or "same model"
    at = report.dtype if row.k is None else f"{report.dtype}, k' = {row.k}"
    return f"| {case.name} | whole models, {row.tokens} tokens, {at} | {verdict}: {logits}KL {row.ours.kl:.1e}{sets} |"


def round_trip(hf: Path, folder: Path) -> str:
    """How many tensors come back from an export bit by bit, in name and type too."""
    import torch

    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.safetensors_files import SafetensorsFolder

    export_model(folder / "megatron", folder / "exported", report=lambda line: None)
    before, after = SafetensorsFolder(hf), SafetensorsFolder(folder / "exported")
    ours, theirs = after.read(after.tensors), before.read(before.tensors)
    same = [
        name
        for name, tensor in theirs.items()
        if name in ours and ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
    ]
    return f"{len(same)} of {len(ours.keys() | theirs.keys())} bit-identical"


if __name__ == "__main__":
    main()
