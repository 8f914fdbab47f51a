"""Join sweeps of one checkpoint over the same data, each with some of the k', into one result.

    python tools/join_sweeps.py sweep.k4.json sweep.k8.json --out sweep.json

A k' in several of them is taken from the last. --out is replaced when everything has been read and fits.
"""

import sys

from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import path_word
from megatron_emoe.settings.paths import check_out
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep.result import SweepResult, agreed, load, save, upsert_cell


def join(paths: list[str]) -> SweepResult:
    """One result with the cells of all. ValueError where two are not of the same checkpoint, data and setting."""
    joined = load(paths[0])
    for path in paths[1:]:

        def demand(key: str, theirs: object, ours: object, path: str = path) -> None:
            if theirs != ours:
                raise ValueError(f"{path}: {key}: {theirs!r}; must equal {ours!r} in {paths[0]}: not one sweep")

        part = load(path)
        joined = agreed(joined, part, demand)
        for cell in part.cells:
            joined = upsert_cell(joined, cell)
    return joined


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("sweeps", nargs="+", type=path_word, help="Results of tools/sweep_k.py.")
    parser.add_argument("--out", type=path_word, required=True, help="Result file (JSON).")
    args = parser.parse_args()
    try:
        check_out(args.out)
        joined = join(args.sweeps)
        save(joined, args.out)
    except (ValueError, OSError) as error:  # load() has turned errors of reading into ValueErrors
        told = f"--out {args.out}: cannot be written ({error.strerror})" if isinstance(error, OSError) else error
        fail(told)
    print(f"{args.out}: k' {', '.join(str(cell.k) for cell in joined.cells)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
