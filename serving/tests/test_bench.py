"""The load test of a server (tools/serve_bench.py) on a real one, with vLLM's own benchmark in between."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import served
from http_server import Server

PYTHON = os.environ.get("EMOE_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="EMOE_PYTHON names no Python that has megatron_emoe")
REQUESTS, PROMPT, OUTPUT = 6, 40, 5
HEADER = np.dtype("S9, <u8, u1, <u8, <u8")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the tool wrote about a server at k' = 4."""
    here = tmp_path_factory.mktemp("bench")
    np.array(served.tokens(1, 400), np.int32).tofile(here / "tokens.bin")
    index = np.array([(b"MMIDIDX", 1, 4, 1, 2)], HEADER).tobytes() + np.array([400], np.int32).tobytes()
    (here / "tokens.idx").write_bytes(index + np.array([0, 0, 1], np.int64).tobytes())
    folder = served.save("olmoe", here / "m", {"k_train": 2, "k_range": [1, 8]}, tokenizer=True)
    tool = [PYTHON, served.ROOT / "tools/serve_bench.py", "--serve-python", sys.executable]
    sizes = ["--requests", REQUESTS, "--prompt-tokens", PROMPT, "--output-tokens", OUTPUT, "--rates", 20, "--k", 2]
    server = Server(folder, here / "server.log", {"k": 4})
    try:
        url = f"http://127.0.0.1:{server.wait().port}"
        command = [*tool, *sizes, "--server", url, "--data-path", here / "tokens", "--out", here / "served.json"]
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
        refused = subprocess.run([*map(str, command), "--k", "9"], capture_output=True, text=True, timeout=900)
    finally:
        server.stop()
    assert ended.returncode == 0, ended.stderr
    assert refused.returncode == 2 and "--k 9: must be in [1, 8], the k' that are served" in refused.stderr
    return json.loads((here / "served.json").read_text())


def test_every_cell_ran_at_its_k_and_answered_every_request(result):
    ran = REQUESTS * (PROMPT + OUTPUT - 1)  # of an answer the last token is not read again
    assert [(cell.get("k"), cell["tokens"]) for cell in result["cells"]] == [
        (2, [{"k": 2, "tokens": ran}]),
        (None, [{"k": 4, "tokens": ran}]),  # nothing of it was in the prefix cache
    ]
    for cell in result["cells"]:
        assert (cell["completed"], cell["failed"]) == (REQUESTS, 0)
        assert cell["output_tokens_per_second"] == pytest.approx(REQUESTS * OUTPUT / cell["seconds"])
        assert 0 < cell["ttft_ms"]["p50"] <= cell["ttft_ms"]["p99"] < 1e3 * cell["seconds"]
        assert 0 < cell["tpot_ms"]["p50"] <= cell["tpot_ms"]["p99"]
    assert result["vllm"].startswith("0.3") and result["server"]["k_max"] == 8
