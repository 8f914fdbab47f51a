"""What a sweep promised at a k' is what is served at it: a real Megatron checkpoint with learned scales and a tail
scale, exported, swept with transformers, served by vLLM.

examples/served_export.py makes it, with the other environment's Python, which EMOE_PYTHON names (`make test-serve`).
"""

import json
import os
import subprocess

import pytest
import served

import emoe_vllm

PYTHON = os.environ.get("EMOE_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="EMOE_PYTHON names no Python that has megatron_emoe")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder with the export, the sweep, and the tokens of the sweep."""
    folder = tmp_path_factory.mktemp("promise") / "made"
    command = [PYTHON, served.ROOT / "examples/served_export.py", folder]
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VLLM"))}
    ended = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return folder


def losses(llm, sequences, ks):
    """Mean loss of the tokens that count at each k' of `ks`, which all run in one batch. None: the server's k'."""
    asked = [served.params(1, **({} if k is None else {"emoe_k": k})) for k in ks for _ in sequences]
    prompts = [{"prompt_token_ids": one["tokens"]} for one in sequences] * len(ks)
    outputs = iter(llm.generate(prompts, asked, use_tqdm=False))
    found = {}
    for k in ks:
        counted = []
        for one, output in zip(sequences, outputs, strict=False):
            steps = zip(output.prompt_logprobs[1:], one["tokens"][1:], one["counts"], strict=True)
            counted += [-step[token].logprob for step, token, counts in steps if counts]
        found[k] = sum(counted) / len(counted)
    return found


def test_the_promised_curve_is_the_served_curve(made):
    sweep, stored = (json.loads((made / name).read_text()) for name in ("sweep.json", "tokens.json"))
    block = json.loads((made / "exported/config.json").read_text())["emoe"]
    assert block["budget_scales"] and block["tail_scale"] and sweep["data"]["digest"] == stored["digest"]
    promised = {json.dumps(cell["k"]): cell["loss"] for cell in sweep["cells"]}
    uniform = [cell["k"] for cell in sweep["cells"] if isinstance(cell["k"], int)]
    per_layer = [cell["k"] for cell in sweep["cells"] if not isinstance(cell["k"], int)]
    assert len(uniform) == 8 and len(per_layer) == 2
    assert max(promised.values()) - min(promised.values()) > 50 * served.TOLERANCE  # k' matters
    with served.engine(made / "exported", {"k_min": 1, "k_max": 16}) as llm:
        found = {json.dumps(k): loss for k, loss in losses(llm, stored["sequences"], uniform).items()}
        for k in per_layer:
            emoe_vllm.set_k(llm, k)
            found[json.dumps(k)] = losses(llm, stored["sequences"], [None])[None]
    differences = {k: found[k] - promised[k] for k in promised}
    assert max(map(abs, differences.values())) < served.TOLERANCE, differences
