"""The load test of a server: what it sends, what it makes of the answers, and what it refuses. The server and vLLM's
benchmark are stand-ins here; serving/tests/test_bench.py runs the real ones."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from megatron_emoe.data.files import INDEX_HEADER, INDEX_MAGIC
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import named_budgets, served
from megatron_emoe.sweep.serving_client import prompts
from tests.sweep_results import make_result

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools"))
import serve_bench  # noqa: E402

BENCHMARK = """#!{python}
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    with open("{notes}", "a") as notes:
        notes.write(line)
    if asked["rate"] == 9:
        found = {{"completed": 0, "failed": 2, "output_lens": [0, 0], "ttfts": [0, 0], "latencies": [0, 0]}}
        found |= {{"errors": ["first\\nConnection lost", ""], "duration": 1.0}}
    elif asked["rate"] == 8:
        sys.exit("ValueError: no such thing")
    else:
        found = {{"completed": 2, "failed": 1, "output_lens": [5, 3, 0], "ttfts": [0.1, 0.3, 0], "duration": 2.0}}
        found |= {{"latencies": [0.5, 0.4, 0], "errors": ["", "", "lost"]}}
    print(json.dumps(found), flush=True)
"""
STATUS = {"k": 8, "k_train": 4, "k_min": 2, "k_max": 12, "follow": None}


def write_tokens(prefix: Path, count: int = 500) -> Path:
    """One document of random tokens, in Megatron's format."""
    np.random.default_rng(1).integers(0, 128, count, dtype=np.int32).tofile(f"{prefix}.bin")
    index = INDEX_HEADER.pack(INDEX_MAGIC, 1, 4, 1, 2) + np.array([count], np.int32).tobytes()
    Path(f"{prefix}.idx").write_bytes(index + np.array([0, 0, 1], np.int64).tobytes())
    return prefix


class Routes(BaseHTTPRequestHandler):
    """GET /emoe: since the one before, 10 tokens ran at k' = 4, 5 of them in answers, and 30 at k' = 8."""

    asked = 0
    elastic = True

    def do_GET(self):
        found = {"/v1/models": {"data": [{"id": "m", "max_model_len": 64}]}, "/version": {"version": "0.32.0"}}
        if self.path == "/emoe" and Routes.elastic:
            Routes.asked += 1
            tokens = {"tokens": [[4, 10 * Routes.asked], [8, 30 * Routes.asked]], "decode": [[4, 5 * Routes.asked]]}
            found["/emoe"] = STATUS | tokens
        self.send_response(200 if self.path in found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(found.get(self.path, {"detail": "Not Found"})).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Routes, "elastic", True)
    with ThreadingHTTPServer(("127.0.0.1", 0), Routes) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


@pytest.fixture
def words(server, tmp_path):
    """A command line that is right, and the folder that it works in."""
    write_tokens(tmp_path / "tokens")
    python = tmp_path / "python"
    python.write_text(BENCHMARK.format(python=sys.executable, notes=tmp_path / "notes"))
    python.chmod(0o755)
    fixed = {"--server": server, "--data-path": tmp_path / "tokens", "--out": tmp_path / "served.json"}
    fixed |= {"--serve-python": python, "--prompt-tokens": 8, "--output-tokens": 5, "--requests": 3, "--seed": 7}
    return [str(word) for pair in fixed.items() for word in pair]


@pytest.mark.slow
def test_cells_of_equal_requests_at_every_rate_and_k(words, tmp_path, capsys):
    sweep.save(make_result("m", {4: 2.0, 8: 1.6}), tmp_path / "sweep.json")
    serve_bench.main([*words, "--rates", "1", "2", "--k", "2", "--losses", str(tmp_path / "sweep.json")])
    result = served.load(tmp_path / "served.json")
    assert [(cell.rate, cell.k) for cell in result.cells] == [(1, 2), (1, None), (2, 2), (2, None)]
    cell = result.cells[0]
    # Of the two that came to their end: 4 tokens after the first in 0.4 s, 2 in 0.1 s.
    assert (cell.ttft_ms.mean, cell.ttft_ms.p50) == pytest.approx((200, 200))
    assert cell.ttft_ms.p99 == pytest.approx(298)  # 99 % of the way from 100 to 300
    assert (cell.tpot_ms.mean, cell.tpot_ms.p99) == pytest.approx((75, 99.5))
    assert (cell.requests_per_second, cell.output_tokens_per_second, cell.failed) == (1, 4, 1)
    assert [(each.k, each.tokens) for each in cell.tokens] == [(4, 10), (8, 30)]
    assert (cell.mean_k, cell.mean_k_written) == (7, 4) and cell.mean_loss == pytest.approx((10 * 2.0 + 30 * 1.6) / 40)
    assert result.server == STATUS and (result.vllm, result.seed, result.model) == ("0.32.0", 7, "m")
    assert (tmp_path / "served.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert (
        "| 2 | the server's own | 7.00 | 4.00 | 1.7000 | 1 (1 failed) | 4 | 200 | 200 | 298 | 75 | 75 | 99.5 |" in out
    )
    warm, sent = sent_in(tmp_path)
    assert {run["rate"] for run in warm} == {None} and len(warm) == 2
    assert all(run["prompts"] == sent[0]["prompts"] and run["seed"] == 7 for run in sent)
    assert [run["body"].get("vllm_xargs") for run in sent] == [{"emoe_k": 2}, None] * 2
    assert len({run["body"]["cache_salt"] for run in [*warm, *sent]}) == len(sent) + len(warm)


def sent_in(folder: Path) -> tuple[list[dict], list[dict]]:
    """The runs that warm up, and the others."""
    runs = [json.loads(line) for line in (folder / "notes").read_text().splitlines()]
    warm = [run for run in runs if run["rate"] is None]
    return warm, [run for run in runs if run not in warm]


def test_prompts_are_pieces_of_the_data(tmp_path):
    data = write_tokens(tmp_path / "tokens")
    tokens = np.fromfile(f"{data}.bin", np.int32).tolist()
    found = prompts(str(data), 5, 12, seed=3)
    assert found == prompts(str(data), 5, 12, seed=3) != prompts(str(data), 5, 12, seed=4)
    pieces = {tuple(tokens[start : start + 12]) for start in range(len(tokens) - 11)}
    assert len(found) == 5 and {tuple(piece) for piece in found} <= pieces


def test_losses_are_those_of_a_sweep_or_of_a_table(tmp_path):
    result = make_result("m", {2: 2.02, 4: 2.0, 8: 2.1})
    sweep.save(result, tmp_path / "sweep.json")
    named_budgets.save(named_budgets.budget_table(result), tmp_path / "budgets.json")
    assert serve_bench.losses_in(tmp_path / "sweep.json") == {2: 2.02, 4: 2.0, 8: 2.1}
    assert serve_bench.losses_in(tmp_path / "budgets.json") == {2: 2.02, 4: 2.0}


def test_means_are_over_tokens_and_of_what_is_known():
    assert served.weighted({2: 10, (2, 6): 30, 9: 0}, {2: 2.0, (2, 6): 4.0}) == 3.5
    assert served.weighted({2: 10, 4: 1}, {2: 2.0}) is None and served.weighted({}, {}) is None
    before, after = ({4: 5, 8: 2}, served.counts([[4, 5], [8, 9], [[2, 6], 3]]))
    assert served.between(before, after) == {8: 7, (2, 6): 3}


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["--rates", "1", "--k", "13"], 2, "--k 13: must be in [2, 12], the k' that are served"),
        (
            ["--rates", "1", "--prompt-tokens", "60"],
            2,
            "--prompt-tokens 60 --output-tokens 5: must be at most 64 together",
        ),
        (["--rates", "1", "--data-path", "/nowhere"], 2, "--data-path /nowhere.bin does not exist"),
        (["--rates", "1", "--prompt-tokens", "9999"], 2, "tokens; must have --prompt-tokens 9999"),
        (["--rates", "1", "--losses", "/nowhere"], 2, "/nowhere: cannot be read"),
        (["--rates", "1", "--serve-python", "/nowhere"], 2, "--serve-python /nowhere: no such program"),
        (["--rates", "1", "--server", "http://127.0.0.1:9"], 2, "--server http://127.0.0.1:9: no server answers there"),
        (["--rates", "1", "--server", "word"], 2, "--server word: no server answers there"),
        (["--rates", "9"], 1, "k' = the server's own at 9 requests/s: no request came to its end: Connection lost"),
        (["--rates", "8"], 1, "vLLM's benchmark ended: ValueError: no such thing"),
    ],
)
def test_what_cannot_be_measured_is_said(words, tmp_path, capsys, more, status, message):
    with pytest.raises(SystemExit) as left:
        serve_bench.main([*words, *more])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == status and ": error: " in line and message in line
    assert not (tmp_path / "served.json").exists() and not (tmp_path / "served.png").exists()


def test_a_server_without_the_plugin(words, capsys, monkeypatch):
    monkeypatch.setattr(Routes, "elastic", False)
    with pytest.raises(SystemExit) as left:
        serve_bench.main([*words, "--rates", "1"])
    assert left.value.code == 2
    assert "serves no k' to choose: no plugin; it is started with VLLM_PLUGINS=emoe" in capsys.readouterr().err
