"""What a load test asks of a running vLLM with the plugin, and the prompts that it sends. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_emoe.data.files import read_token_files

PATIENCE = 30.0
"""Seconds for an answer to a question about the server itself."""


class Server:
    """A server at `url`. Every method raises `ValueError`, of one line, where it is not as it must be."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        key = os.environ.get("OPENAI_API_KEY")
        try:
            asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {key}"} if key else {})
            with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise ValueError(f"--server {self.url}: {path} answers {error.code}{_message(error)}") from error
        except (OSError, ValueError) as error:  # of the connection; of an URL or an answer that is none
            raise ValueError(f"--server {self.url}: no server answers there ({error})") from error

    def status(self) -> dict[str, Any]:
        """What GET /emoe says."""
        try:
            return self.get("/emoe")
        except ValueError as error:
            if " answers 404" not in str(error):
                raise
            why = str(error).partition("answers 404")[2] or ": no plugin; it is started with VLLM_PLUGINS=emoe"
            raise ValueError(f"--server {self.url}: serves no k' to choose{why}") from error

    def model(self) -> tuple[str, int]:
        """Name of the model, and the most tokens of a prompt with its answer."""
        try:
            found = self.get("/v1/models")["data"][0]
            return found["id"], found["max_model_len"]
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"--server {self.url}: /v1/models names no model of vLLM's") from error

    def version(self) -> str | None:
        """Of vLLM, where the server says it."""
        try:
            return self.get("/version")["version"]
        except (ValueError, KeyError, TypeError):
            return None


def _message(error: urllib.error.HTTPError) -> str:
    """What our routes say beside the status; FastAPI itself says no more than `Not Found`."""
    try:
        return f": {json.loads(error.read())['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return ""


def check_ks(ks: Sequence[int], status: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a k' that the server does not admit."""
    for k in ks:
        if not status["k_min"] <= k <= status["k_max"]:
            raise ValueError(f"--k {k}: must be in [{status['k_min']}, {status['k_max']}], the k' that are served")


def prompts(prefix: str, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` pieces of `length` tokens of the data at `prefix` (.bin and .idx), cut at random places.

    Raises:
        ValueError: a file is missing or broken, or holds fewer tokens than one piece.
    """
    try:
        files = read_token_files(prefix)
    except ValueError as error:
        raise ValueError(f"--data-path {error}") from error
    if files.tokens < length:
        raise ValueError(f"--data-path {prefix}: has {files.tokens} tokens; must have --prompt-tokens {length}")
    tokens = np.memmap(f"{prefix}.bin", files.dtype, "r")
    starts = np.random.default_rng(seed).integers(0, files.tokens - length + 1, count)
    return [tokens[start : start + length].tolist() for start in starts]


class Load:
    """vLLM's own benchmark in its environment, `python` (emoe_vllm.bench): a process that takes one run after another.

    log: where what it says goes.
    """

    def __init__(self, python: Path, log: Path) -> None:
        self.python, self.log = python, log

    def __enter__(self) -> Load:
        self._out = self.log.open("w")
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._out, "text": True}
        self._process = subprocess.Popen([self.python, "-m", "emoe_vllm.bench"], env=variables, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()

    def run(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """One run; see emoe_vllm.bench. Raises `ValueError` where the process has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is in the log
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            said = self.log.read_text().strip().splitlines()
            raise ValueError(f"--serve-python {self.python}: vLLM's benchmark ended: {said[-1] if said else 'no word'}")
        return json.loads(line)
