"""A server that is killed and started again, with code compiled for another k' in its cache: nothing is left over."""

import threading
import time
from contextlib import suppress

import served
from http_server import Server, right

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
KS = (3, 8)


def logprobs(answer):
    return answer["choices"][0]["logprobs"]["token_logprobs"]


def close(found, expected):
    return max(abs(one - other) for one, other in zip(found, expected, strict=True)) < served.TOLERANCE


def test_nothing_is_left_of_a_killed_server(tmp_path):
    folder = served.save("olmoe", tmp_path / "m", BLOCK, tokenizer=True)
    reference, prompt, cache = served.Reference(folder), served.tokens(1), tmp_path / "cache"
    follow = {"follow": {"0": 6, "2": 1}, "hold": 4}
    first = Server(folder, tmp_path / "first.log", {"k": 5} | follow, cache)
    try:
        first.wait()
        before = {k: first.complete(prompt, emoe_k=k)[1] for k in KS}
        assert right(reference, prompt, first.complete(prompt)[1], 5, 6)
        assert first.call("/emoe/k", {"k": 2})[1]["follow"]["now"] is False
        hanging = threading.Thread(target=swallow, args=(first.complete, served.tokens(2), 200), daemon=True)
        hanging.start()
        while not first.metrics()["emoe:tokens_total"].get((("k", "2"), ("phase", "decode"))):
            time.sleep(0.05)  # until it writes
    finally:
        first.kill()
    hanging.join(60)
    assert not hanging.is_alive()
    (shared := tmp_path / "metrics").mkdir()
    second = Server(folder, tmp_path / "second.log", {"k": 2} | follow, cache, shared)
    try:
        second.wait()
        status, metrics = second.call("/emoe")[1], second.metrics()
        assert (status["k"], status["k_now"], status["follow"]["now"], status["changes"]) == (2, 6, True, 0)
        assert status["tokens"] == [] and "emoe:tokens_total" not in metrics
        assert metrics["emoe:k"] == {(): 6.0} and metrics["emoe:level_changes_total"] == {(): 0.0}
        for k in KS:
            again = second.complete(prompt, emoe_k=k)[1]
            assert close(logprobs(again), logprobs(before[k])) and right(reference, prompt, again, k)
        assert right(reference, prompt, second.complete(prompt)[1], 2, 6)
        metrics = second.metrics()
        tokens = metrics["emoe:tokens_total"]
        assert tokens[("k", "2"), ("phase", "prefill")] == len(prompt) and tokens[("k", "6"), ("phase", "decode")] == 3
        assert metrics["vllm:prompt_tokens_total"] == {(): 3.0 * len(prompt)} and any(shared.iterdir())
    finally:
        second.stop()


def swallow(ask, *args):
    """The answer never comes."""
    with suppress(OSError):
        ask(*args)
