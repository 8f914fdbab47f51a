"""Under torchrun on two GPUs: a flex dispatcher against all-to-all over two expert ranks (test_dispatchers.py)."""

import sys

from tests.gpu.layers import process_groups
from tests.gpu.test_dispatchers import DEEPEP, HYBRIDEP, compare
from tests.tiny import COACTIVATION, PREFIX


def main() -> None:
    """Compare, and say so."""
    dispatcher = {"deepep": DEEPEP, "hybridep": HYBRIDEP}[sys.argv[1]]
    with process_groups(expert_model_parallel_size=2):
        for elastic in (COACTIVATION, PREFIX):
            compare(elastic | {"expert_model_parallel_size": 2}, dispatcher)
    print(f"{sys.argv[1]}: equal at every k", flush=True)


if __name__ == "__main__":
    main()
