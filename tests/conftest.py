"""Shared pytest set-up: the repository root is importable, and tests marked gpu skip themselves without CUDA."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
VISIBLE = "CUDA_VISIBLE_DEVICES"
GPU = TESTS / "gpu"  # every test marked gpu is in there
HEARD = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
sys.path.insert(0, str(TESTS.parent))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` alone imports nothing but tests/gpu: other tests need packages that a GPU machine need not have."""
    if config.getoption("markexpr") != "gpu" or TESTS not in collection_path.parents:
        return None
    return None if collection_path == GPU or GPU in collection_path.parents else True


def pytest_configure(config: pytest.Config) -> None:
    """Workers of one run share the server that their programs and ranks are forks of (tests/programs)."""
    hear_signals()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads wait for one another at work: on a busy machine for long
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        from tests import programs

        os.environ[programs.SHARED] = str(programs.start())


def hear_signals() -> None:
    """Programs that tests start find every signal at its default, as from a terminal, and none ignored, as under nohup.

    What is ignored would be ignored by programs too; what has a handler is at its default in a new program. This
    handler does nothing: here the signal is ignored as before.
    """
    for number in HEARD:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Processes that a test starts see no GPU unless it is marked gpu: what they do is the same on every machine.

    This process has looked for one before, where such a test is to come, and keeps what it has found.
    """
    before = os.environ.get(VISIBLE)
    if not item.get_closest_marker("gpu"):
        os.environ[VISIBLE] = ""
    result = yield
    os.environ.pop(VISIBLE, None)
    if before is not None:
        os.environ[VISIBLE] = before
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip every test marked gpu where torch sees no CUDA device (torch is imported only if there is such a test)."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if torch.cuda.is_available():
        return
    for item in gpu_items:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What a test has to say beside passing, from any worker: record_property("said at the end", ...)."""
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "said at the end":
                terminalreporter.write_line(value)
