"""A wall of bad input: every flag of ours and every file, of every program, with every bad value (tests/wall.py).

Each case ends with status 2 and one line that names flag or path and value, writes nothing, and starts no work.
docs/reliability.md has their number.
"""

import re
from pathlib import Path

import pytest

from tests import wall
from tests.distributed import REPO, run_ranks

pytestmark = pytest.mark.slow

SECONDS = 5.0
"""Of processor, without the imports, which are made before: tests/tools/test_fast_starts.py has those."""

IS_RIGHT = {
    "--emoe-pool-keep 0": "none is kept",
    "--emoe-pool-anneal-iters 0": "the pool does not grow",
    "--emoe-seed -1": "a seed is any whole number",
    "--emoe-seed 0": "a seed is any whole number",
    f"--emoe-seed {wall.HUGE[:12]}": "a seed is any whole number",
    "--emoe-hr-loss-coeff 0": "no such loss",
    "--emoe-distill-coeff 0": "no such loss",
    "--emoe-second-pass 0": "no such pass",
    "--emoe-coactivation-interval 0": "never",
    f"--emoe-coactivation-interval {wall.HUGE[:12]}": "after the run's end",
    f"--coverage-at-least {wall.HUGE[:12]}": "no pair was seen as often",
    f"--max-eval-tokens {wall.HUGE[:12]}": "all tokens that there are",
    f"--limit {wall.HUGE[:12]}": "all documents that there are",
    "--num-fewshot 0": "a prompt without examples",
    "--holdout 0": "nothing is held out",
    "--ckpt-step 0": "as if not given, as Megatron has it",
    f"--global-batch {wall.HUGE[:12]}": "a plan is arithmetic",
    f"--gpus-per-node {wall.HUGE[:12]}": "one node holds all",
    "recipe.args empty": "no flag, no harm",
    f"serve_bench.py --k {wall.HUGE[:12]}": "only the server knows what it admits",
    f"serve_bench.py --output-tokens {wall.HUGE[:12]}": "the same",
    "serve_bench.py --seed 0": "a seed may be 0",
    "report.py --seeds -1": "a seed is any whole number",
    "report.py --seeds 0": "the same",
    f"report.py --seeds {wall.HUGE[:12]}": "the same",
    "plan_job.py --recipe empty": "the same",
    "pick_k.py with --budgets --budgets empty": "replaced",
    "pick_k.py with --budgets --budgets dangling": "replaced",
    "join_sweeps.py --out empty": "replaced",
    "join_sweeps.py --out dangling": "replaced",
    "sweep_k.py --out dangling": "replaced",
    "eval_tasks.py --out dangling": "replaced",
    "fit_tail_scale.py --out empty": "replaced",
    "fit_tail_scale.py --out dangling": "replaced",
    "preprocess_data.py --output-prefix empty": "a file of that name is none of the result's",
    "preprocess_data.py --output-prefix dangling": "the same",
    "preprocess_data.py --output-prefix missing/at/a": "the folder is made",
    "preprocess_data.py --chat --output-prefix empty": "as without --chat",
    "preprocess_data.py --chat --output-prefix dangling": "the same",
    "preprocess_data.py --chat --output-prefix missing/at/a": "the same",
}
"""What is no mistake, for all programs or for one, with the reason."""
HARMLESS = ("crlf", "bom", "a key is new")
"""Ways of being wrong that a program may read over: if it does, it goes on."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wall") / "folder"
    folder.mkdir()
    run_ranks(wall.prepare, 1, folder)
    return folder


NAMES = [program.name for program in wall.programs()]
counted: dict[str, int] = {}


@pytest.mark.parametrize("name", NAMES)
def test_no_bad_value_passes_and_none_ends_in_a_traceback(name, folder):
    ends = run_ranks(wall.ends_of, 1, name, folder)[0]
    wrong = {end.name: (end.status, end.err, end.new) for end in ends if not (is_refused(end) or may_pass(name, end))}
    assert not wrong, "\n".join(f"{case}: {seen}" for case, seen in wrong.items())
    slow = {end.name: end.seconds for end in ends if end.seconds > SECONDS}
    assert not slow
    counted[name] = len(ends)


def is_refused(end: wall.Ended) -> bool:
    lines = [line for line in end.err.splitlines() if line.strip() and not line.startswith("host mode: ")]
    told = any(re.sub(r"\s+", " ", word) in end.err for word in end.told)
    return end.status == 2 and len(lines) == 1 and ": error: " in lines[0] and told and not end.new


def may_pass(program: str, end: wall.Ended) -> bool:
    is_right = {end.name, f"{program} {end.name}"} & set(IS_RIGHT)
    return end.status in (0, None) and (bool(is_right) or end.name.endswith(HARMLESS))


def test_the_page_has_the_number_of_cases(record_property):
    said = re.search(r"(\d+) cases", (REPO / "docs" / "reliability.md").read_text())
    assert said is not None and set(counted) == set(NAMES)
    record_property("said at the end", f"{sum(counted.values())} cases of bad input, none passed")
    assert int(said[1]) <= sum(counted.values()) < 1.1 * int(said[1])  # more with every flag
