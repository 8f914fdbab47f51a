"""One server, every k': a tiny model trained elastically and served by vLLM with the plugin, some minutes on two cores.

served_export.py makes the export, its sweep and its named budgets. Here a real vLLM serves it on the CPU: the same
question at three k', alone and in one batch; a burst of requests that name none, under which the server goes to a
smaller k' and back; and the sweep's loss at each k' beside the one that the server's own log-probabilities give over
the same tokens. Everything lands in demo-serve/, which is made anew.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import served_export
from running_server import Server

from megatron_emoe.sweep import curve as sweep

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "demo-serve"
PROMPT = "    def __init__(self"
KS = (2, 4, 12)
LENGTH = 24
FOLLOW = {"0": 8, "4": 4, "12": 2}
"""Requests that wait or run -> k' of those that name none."""
BURST = 32


def ask(server: Server) -> None:
    """The same question at three k', one after the other and in one batch."""
    alone = [_answer(server, k) for k in KS]
    for k, text in zip(KS, alone, strict=True):
        print(f"k' = {k}: {json.dumps(PROMPT + text)}")
    with ThreadPoolExecutor(len(KS)) as pool:
        together = list(pool.map(lambda k: _answer(server, k), KS))
    print(f"all three in one batch: {'the same answers' if together == alone else 'other answers'}")


def _answer(server: Server, k: int) -> str:
    """Drawn, but from one seed: so little training answers greedily with empty lines alone."""
    return server.complete(PROMPT, LENGTH, temperature=0.7, seed=0, vllm_xargs={"emoe_k": k})["text"]


def burst(server: Server) -> None:
    """Requests that name no k': one, then many at once, then one. Which k' their tokens ran at."""
    for count in (1, BURST, 1):
        before = server.served()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda _: server.complete(PROMPT, 2 * LENGTH), range(count)))
        ran = {k: tokens - before.get(k, 0) for k, tokens in server.served().items()}
        shown = ", ".join(f"{tokens} at k' = {k}" for k, tokens in ran.items() if tokens)
        print(f"{count:>3} requests at once: tokens {shown}")


def compare(server: Server, out: Path) -> float:
    """The table of the promised and the served loss; the largest difference, nats per token."""
    result, stored = sweep.load(out / "sweep.json"), json.loads((out / "tokens.json").read_text())
    assert result.data.digest == stored["digest"], "tokens.json has other tokens than the sweep"
    print("| k' | the sweep's loss | the server's | difference |\n| ---: | ---: | ---: | ---: |")
    largest = 0.0
    for k in KS:
        promised, served = sweep.loss_at(result, k), server.loss(stored["sequences"], k)
        print(f"| {k} | {promised:.6f} | {served:.6f} | {served - promised:+.1e} |", flush=True)
        largest = max(largest, abs(served - promised))
    return largest


def serve(python: Path, out: Path) -> None:
    """All that is shown of the running server."""
    settings = {"k": 8, "budgets": str(out / "budgets.json"), "follow": FOLLOW}
    server = Server(python, out / "exported", out / "logs/server.log", settings)
    print(f"\n== serve\n$ VLLM_PLUGINS=emoe {shlex.join(server.command)}".replace(f"{REPO}/", ""), flush=True)
    start = time.perf_counter()
    with server:
        print(f"(up after {time.perf_counter() - start:.0f} s)")
        ask(server)
        print(f"\n== k' by load: {json.dumps(FOLLOW)}")
        burst(server)
        print("\n== the promised curve is the served one")
        compare(server, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--serve-python",
        type=Path,
        default=REPO / ".venv-serve/bin/python",
        metavar="PYTHON",
        help="of the environment that has vLLM and the plugin (make setup-serve)",
    )
    python = parser.parse_args().serve_python
    if not python.exists():
        parser.error(f"--serve-python {python}: is not there; make setup-serve makes it")
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    served_export.make(OUT)
    serve(python.absolute(), OUT)
    print(f"\n{time.perf_counter() - start:.0f} s in all; everything is in {OUT}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
