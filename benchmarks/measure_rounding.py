"""What rounding alone does between two right implementations: the figures behind megatron_emoe/hf/verify.py's bounds.

    python benchmarks/measure_rounding.py [--seeds 3]

Tiny random models of every architecture are imported and compared at several k', in fp32 and in bf16. Printed are the
largest distance of ours from transformers in units of the noise (transformers against itself, jittered), and in bf16
the largest distances themselves.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

KS = [1, 2, 4, 8]


@dataclass
class Figures:
    """Maxima over all models and k'. logit_ratio, kl_ratio: ours over the noise."""

    logit_ratio: float = 0.0
    kl_ratio: float = 0.0
    logit: float = 0.0
    noise: list[float] = field(default_factory=list)
    kl: float = 0.0
    other_top1: float = 0.0
    other_sets: float = 0.0

    def add(self, ours, noise) -> None:
        """Take in one comparison: two Distances."""
        self.logit_ratio = max(self.logit_ratio, ours.max_difference / noise.max_difference)
        self.kl_ratio = max(self.kl_ratio, ours.kl / noise.kl)
        self.noise.append(noise.max_difference)
        for name, value in (("logit", ours.max_difference), ("kl", ours.kl)):
            setattr(self, name, max(getattr(self, name), value))
        self.other_top1 = max(self.other_top1, ours.other_top1)
        self.other_sets = max(self.other_sets, ours.other_sets)


def measure(seeds: int, folder: Path) -> dict[bool, Figures]:
    """Figures in fp32 (False) and bf16 (True)."""
    import torch

    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.verify import verify
    from tests import hf_models

    hf_models.hasten()
    figures = {False: Figures(), True: Figures()}
    for model_type in hf_models.MODEL_TYPES:
        for seed in range(seeds):
            place = folder / f"{model_type}-{seed}"
            hf = hf_models.save(model_type, place / "hf", seed=seed, dtype=torch.bfloat16)
            import_model(hf, place / "out", report=str)
            for bf16, maxima in figures.items():
                for row in verify(hf, place / "out", ks=KS, bf16=bf16, report=str).rows:
                    maxima.add(row.ours, row.noise)
            print(f"{model_type} {seed}", file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Models of each architecture. Default: 3.")
    seeds = parser.parse_args().seeds
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_emoe.host import mode as host_mode

    host_mode.setup([])
    with tempfile.TemporaryDirectory() as folder:
        exact, rounded = measure(seeds, Path(folder)).values()
    print(f"{4 * seeds} models, k' = {KS}")
    print(f"fp32: max |dlogit| {exact.logit:.1e}, noise {min(exact.noise):.1e} to {max(exact.noise):.1e}")
    print(f"fp32: ours over the noise: max |dlogit| {exact.logit_ratio:.1f}, KL {exact.kl_ratio:.1f}")
    print(f"bf16: max |dlogit| {rounded.logit:.1f}, KL {rounded.kl:.1e}, ", end="")
    print(f"other top-1 {rounded.other_top1:.1%}, other sets {rounded.other_sets:.1%}")


if __name__ == "__main__":
    main()
