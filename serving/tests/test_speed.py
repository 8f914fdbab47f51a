"""`make bench-serve` on a tiny model: every part of it runs and reaches the report."""

import json
import sys

import served

sys.path.insert(0, str(served.ROOT / "benchmarks"))

import bench_serve
import serve_engines
import serve_ramp


def test_every_part_is_measured_and_reported(tmp_path, monkeypatch):
    tiny = serve_engines.Shape(hidden=64, width=32, experts=12, layers=1, vocabulary=64)
    monkeypatch.setattr(bench_serve, "QUICK", tiny)
    out, figures = tmp_path / "report.md", tmp_path / "figures.json"
    out.write_text("before\n<!-- part: serving -->\nold\n<!-- end of part: serving -->\nafter\n")
    words = f"bench_serve.py --quick --eager --steps 2 --prompts 2 --json {figures} --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    bench_serve.main()
    found = json.loads(figures.read_text())
    uniform, mixed = found["cells"][:16], found["cells"][16:]
    assert [cell["k"] for cell in uniform[::4]] == [[2], [4], [8], [12]] and len(mixed) == 3
    assert all(cell["low"] <= cell["ratio"] <= cell["high"] and cell["stock_ms"] > 0 for cell in found["cells"])
    phases, tokens = found["ramp"]["phases"], found["ramp"]["tokens"]
    assert [phase["requests"] for phase in phases[:7]] == [2, 4, 8, 12, 16, 24, 32]
    assert [phase["k"] for phase in phases[:7]] == [12, 12, 12, 8, 8, 4, 4]  # by STARTS
    weighted = sum(serve_ramp.LOSSES[int(k)] * count for k, count in tokens.items()) / sum(tokens.values())
    assert found["ramp"]["losses"]["follow"] == weighted
    text = out.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "| decode | 8 | 2, 4, 8, 12 |" in text and text.count("| follow |") == 1
