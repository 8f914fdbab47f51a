"""Join sweeps of one checkpoint over the same data, each with some of the k', into one result.

    python tools/join_sweeps.py sweep.k4.json sweep.k8.json --out sweep.json

A k' in several of them is taken from the last. --out is replaced when everything has been read and fits.
"""

import argparse
import os
import sys

from megatron_emoe.sweep_result import SweepResult, load, resume, save, upsert_cell, with_digest


def join(paths: list[str]) -> SweepResult:
    """One result with the cells of all. ValueError where two are not of the same checkpoint, data and setting."""
    joined = load(paths[0])
    for path in paths[1:]:
        part = load(path)
        resume(path, joined)  # it compares the headers, and names what differs
        if part.data.digest is not None:
            joined = with_digest(joined, part.data.digest)
        for cell in part.cells:
            joined = upsert_cell(joined, cell)
    return joined


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="+", help="Results of tools/sweep_k.py.")
    parser.add_argument("--out", required=True, help="Result file (JSON).")
    args = parser.parse_args()
    try:
        joined = join(args.sweeps)
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    save(joined, args.out)
    print(f"{args.out}: k' {', '.join(str(cell.k) for cell in joined.cells)}")


if __name__ == "__main__":
    main()
