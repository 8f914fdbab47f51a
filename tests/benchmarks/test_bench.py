"""The report of `make bench`: each part replaces itself and nothing else; ratios from hand arithmetic; no half runs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import programs

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))
import bench  # noqa: E402
import measure_conversion  # noqa: E402
import paired  # noqa: E402


def test_a_part_replaces_itself_alone():
    report = bench.with_part(bench.with_part("", "elastic", "old table"), "conversion", "speeds\n")
    changed = bench.with_part(report, "elastic", "new table\n")
    assert changed == report.replace("old table", "new table")
    assert changed.startswith("# Performance\n") and "speeds" in changed


def test_the_report_in_the_repository_has_all_parts():
    text = (REPO / "docs/performance.md").read_text()
    for part in bench.PARTS:
        assert bench.with_part(text, part, "new") != text
        assert text.count(f"<!-- part: {part} -->") == text.count(f"<!-- end of part: {part} -->") == 1


def test_ratio_is_the_median_of_pairs():
    ratio, low, high = paired.ratio_with_interval([1.0, 2.0, 9.0], [2.0, 2.0, 3.0])  # 0.5, 1, 3
    assert (ratio, low, high) == (1.0, 0.5, 3.0)


def test_conversion_rows(monkeypatch):
    runs = [{"copy": 4.0, "seconds": s, "process": s + 10, "peak_bytes": p} for s, p in ((8, 1e9), (5, 2e9), (10, 1e9))]
    result = {"bytes": 4_000_000_000, "group_bytes": 500_000_000, "import": runs, "export": runs}
    monkeypatch.setattr(bench, "_measure", lambda name, *words: result)
    text = bench.conversion(SimpleNamespace(repeats=3, folder="/tmp"))
    # Copies 4 s, conversions 8, 5, 10 s: medians 4 and 8; ratios 0.5, 0.8, 0.4; bound 2 x 0.5 + 1.
    assert "| import | 4.0 | 8.0 | 0.50 | 0.40 to 0.80 | 0.5 | 18.0 | 2.00 | 2.00 |" in text
    assert "A checkpoint of 4.00 GB" in text


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_conversion.shutil, "disk_usage", lambda folder: SimpleNamespace(free=11e9))
    with pytest.raises(SystemExit, match=f"--folder {tmp_path}: 12 GB are needed, 11 GB are free"):
        measure_conversion.check_space(tmp_path / "work", 3_000_000_000)


@pytest.mark.slow
def test_the_measurement_runs_and_leaves_nothing(tmp_path, monkeypatch):
    """One pair with no layer of OLMoE's size: the command is the one that bench.py runs."""
    folder, result = tmp_path / "work", tmp_path / "result.json"
    folder.mkdir()
    words = [programs.python(), "benchmarks/measure_conversion.py", "--folder", folder, "--repeats", "1"]
    words += ["--layers", "1", "--width", "64", result]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    subprocess.run(words, cwd=REPO, check=True, capture_output=True, env=environment)
    measured = json.loads(result.read_text())
    # 2 x 50304 x 64 embedding and head, norm 64, layer: attention 4 x 64 x 64, 4 norms of 64, router, 64 experts.
    parameters = 2 * 50304 * 64 + 64 + 4 * 64 * 64 + 4 * 64 + 64 * 64 + 64 * 3 * 64 * 1024
    assert measured["bytes"] == 2 * parameters
    for kind in ("import", "export"):
        (pair,) = measured[kind]
        assert 0 < pair["seconds"] < pair["process"] and pair["copy"] > 0
        assert 100e6 < pair["peak_bytes"] < 8e9
    assert list(folder.iterdir()) == []
