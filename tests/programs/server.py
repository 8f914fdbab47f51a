"""The server of programs: imports once what programs import, then forks a child for each.

    python -m tests.programs.server FOLDER INTERPRETER

FOLDER/server is its socket, FOLDER/ready is there once it listens, FOLDER/failed after an exception. It ends with
whoever started it (end of stdin).
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from tests.programs import child


class Server:
    """Forks a child for each client, tells it how the child ended, and ends a child whose client is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(folder / "server"))
        self.listener.listen(64)
        self.clients: dict[int, socket.socket] = {}  # by the child's process id
        self.ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        for number in (signal.SIGINT, signal.SIGHUP):  # they are for the one who started this
            signal.signal(number, signal.SIG_IGN)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ, self.accept)
        self.selector.register(self.ended, selectors.EVENT_READ, self.reap)
        self.selector.register(0, selectors.EVENT_READ, self.leave)

    def serve(self) -> None:
        """Until the end of stdin."""
        while True:
            for key, _ in self.selector.select():
                key.data()

    def leave(self) -> None:
        for pid in self.clients:
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def accept(self) -> None:
        """Fork the child that a client asks for."""
        client, _ = self.listener.accept()
        head, streams, _, _ = socket.recv_fds(client, 8, 4)
        size = int.from_bytes(head, "big")
        words = _exactly(client, size) if len(head) == 8 else b""
        if words and len(words) == size:
            self._start(client, json.loads(words), streams)
        else:  # killed before it had said what for
            client.close()
        for stream in streams:
            os.close(stream)

    def _start(self, client: socket.socket, request: dict[str, Any], streams: list[int]) -> None:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # an idle thread of pyarrow's
            pid = os.fork()
        if pid == 0:
            self._become_child(client)
            child.run(request, streams, str(self.folder / "python"))
        self.clients[pid] = client
        self.selector.register(client, selectors.EVENT_READ, lambda: self.lost(pid))
        _tell(client, pid)

    def _become_child(self, client: socket.socket) -> None:
        """Leave to the server what is the server's."""
        signal.set_wakeup_fd(-1)
        self.selector.close()
        for held in (self.listener, client, *self.clients.values()):
            held.close()
        os.close(self.ended)

    def lost(self, pid: int) -> None:
        """A client that says something has ended: it has nothing to say."""
        self._forget(pid)
        os.kill(pid, signal.SIGKILL)  # still to be reaped, so the number is nobody else's

    def reap(self) -> None:
        """Tell the clients of all children that have ended."""
        os.read(self.ended, 4096)
        while self._reap_one():
            pass

    def _reap_one(self) -> bool:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        client = self._forget(pid)
        if client is not None:
            _tell(client, os.waitstatus_to_exitcode(status))
            client.close()
        return pid != 0

    def _forget(self, pid: int) -> socket.socket | None:
        client = self.clients.pop(pid, None)
        if client is not None:
            self.selector.unregister(client)
        return client


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it has ended: the end of its stream says so too
        client.sendall(f"{number}\n".encode())


def _exactly(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = client.recv(size - len(data))
        if not part:
            break
        data += part
    return data


def main(folder: Path, interpreter: str) -> None:
    """The whole server."""
    try:
        (folder / "interpreter").write_text(interpreter)
        import tests.preload
        import tests.programs.preload  # noqa: F401

        server = Server(folder)
        (folder / "ready").touch()
        server.serve()
    except BaseException:
        traceback.print_exc()
        (folder / "failed").touch()  # for those who wait: by now it is said why
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
