"""Run a test on several gloo ranks: as functions in fresh processes, or as a script under torchrun."""

import os
import pickle
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests import programs

REPO = Path(__file__).resolve().parent.parent

# What every rank needs before torch is imported: one thread each, no compiler, and no GPU, should there be one.
_RANK_ENV = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}

# An only rank's environment. Whoever looks for a free port first may find it taken; port 0 is any that is free.
ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """Call fn(*args) on `world_size` gloo ranks in host mode and return what each returned, by rank.

    `fn` lives at module level; `fn`, its arguments and its results are pickled. The ranks are fresh processes, forked
    from a server that has imported Megatron once. Raises RuntimeError with the tracebacks of the ranks that failed, or
    TimeoutError; either way all ranks are ended.
    """
    env = os.environ | _RANK_ENV | ALONE | {"WORLD_SIZE": str(world_size)}
    ranks: list[programs.Call] = []
    try:
        for rank in range(world_size):
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(programs.Call(_rank_main, (fn, args), env))
            if rank == 0:
                env["MASTER_PORT"] = ranks[0].answer.recv()
        return _collect([rank.answer for rank in ranks], time.monotonic() + timeout)
    finally:
        failed = sys.exc_info()[0] is not None
        for rank in ranks:
            rank.end(wait=0 if failed else 30)


def torchrun(
    nproc: int,
    script: str | Path,
    *flags: str,
    cwd: str | Path = REPO,
    env: dict[str, str] | None = None,
    timeout: float = 600,
    check: bool = True,
    interpreter: str | None = None,
) -> subprocess.CompletedProcess:
    """Run `script` under torchrun on `nproc` processes of this machine; stdout holds both streams as text.

    `env` is added to this process's environment. interpreter: a real one (sys.executable) where the start itself is
    what is tested; by default that of tests.programs, which is the faster. Raises RuntimeError with the end of the
    output where `check` and the exit status is not 0, and subprocess.TimeoutExpired, after ending every rank, when
    `timeout` seconds are over.
    """
    with start_torchrun(nproc, script, *flags, cwd=cwd, env=env, interpreter=interpreter) as process:
        output, _ = process.communicate(timeout=timeout)
    if check and process.returncode != 0:
        raise RuntimeError(f"{shlex.join(process.args)} ended with {process.returncode}:\n{output[-6000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, output, "")


@contextmanager
def start_torchrun(
    nproc: int,
    script: str | Path,
    *flags: str,
    cwd: str | Path = REPO,
    env: dict[str, str] | None = None,
    interpreter: str | None = None,
    **pipes: Any,
) -> Iterator[subprocess.Popen]:
    """The same, running; what is left of it is ended afterwards. pipes: where its output goes."""
    launcher = [interpreter or programs.python(), "-m", "torch.distributed.run"]
    launcher += ["--standalone", f"--nproc-per-node={nproc}"]
    python_path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    full_env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | pipes
    process = subprocess.Popen([*launcher, str(script), *flags], cwd=cwd, env=full_env, **pipes)
    try:
        yield process
    finally:
        _end_launcher(process)


def _end_launcher(process: subprocess.Popen) -> None:
    """End torchrun and its ranks, which lead sessions of their own: it ends them itself when it is asked to stop."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()


def wait_until(come: Callable[[], bool], seconds: float = 60) -> None:
    """Look for it twenty times a second; fail when time is over."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Whether a process is there and more than a record of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _rank_main(pipe: Connection, fn: Callable[..., Any], args: tuple) -> None:
    store = _store(pipe)
    try:
        result = ("value", _run_one(store, fn, args))
    except BaseException:
        result = ("error", f"failed:\n{traceback.format_exc()}")
    pipe.send_bytes(pickle.dumps(result))


def _store(pipe: Connection) -> Any:
    """The store of the ranks: the first holds it, and says on which port before another starts."""
    from torch.distributed import TCPStore

    is_first = os.environ["RANK"] == "0"
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=is_first, wait_for_workers=False)
    if is_first:
        os.environ["MASTER_PORT"] = str(store.port)
        pipe.send(os.environ["MASTER_PORT"])
    return store


def _run_one(store: Any, fn: Callable[..., Any], args: tuple) -> Any:
    from megatron_emoe.host import mode as host_mode

    host_mode.enable(force=True)
    import torch.distributed as dist

    ranks = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group("gloo", store=store, **ranks)
    dist.barrier()  # a rank that ends sooner than another has connected would fail it
    try:
        return fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    """What each rank sent, in order. When one fails, the others get two seconds more: the cause may be theirs."""
    answers: dict[int, tuple[str, Any]] = {}
    failed: list[str] = []
    while len(answers) < len(pipes):
        missing = [rank for rank in range(len(pipes)) if rank not in answers]
        ready = wait([pipes[rank] for rank in missing], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for rank in [rank for rank in missing if pipes[rank] in ready]:
            answers[rank] = _receive(pipes[rank])
            if answers[rank][0] == "error":
                failed.append(f"rank {rank} {answers[rank][1]}")
                deadline = min(deadline, time.monotonic() + 2)
    if failed:
        raise RuntimeError("\n".join(failed))
    if len(answers) < len(pipes):
        raise TimeoutError(f"ranks {missing} gave no result in time")
    return [answers[rank][1] for rank in range(len(pipes))]


def _receive(pipe: Connection) -> tuple[str, Any]:
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return "error", "died without a word"
