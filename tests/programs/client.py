"""What `tests.programs.python()` runs: hand the command line to the server beside this file, or to a real interpreter.

Started without site-packages, so that it takes milliseconds. The program that it stands for has another process id.
"""

import json
import os
import signal
import socket
import sys

FOLDER = os.path.dirname(os.path.abspath(sys.argv[0]))
FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGCONT,
)


def target(words):
    """What to run, or None for what only a real interpreter can: the kind, its value, the words behind, how many -u."""
    unbuffered = 0
    while words[:1] == ["-u"]:
        words, unbuffered = words[1:], unbuffered + 1
    if words[:1] in (["-m"], ["-c"]) and len(words) > 1:
        return {"kind": words[0][1], "value": words[1], "words": words[2:], "unbuffered": unbuffered}
    if not words or words[0].startswith("-"):
        return None
    return {"kind": "script", "value": words[0], "words": words[1:], "unbuffered": unbuffered}


def main():
    """Be the program: its streams, its signals, its end."""
    with open(os.path.join(FOLDER, "interpreter")) as file:
        interpreter = file.read()
    request = target(sys.argv[1:])
    if request is None:
        os.execv(interpreter, [interpreter, *sys.argv[1:]])
    ignored = [number for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    request |= {"env": dict(os.environ), "cwd": os.getcwd(), "ignored": sorted(map(int, ignored))}
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to forward to
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.path.join(FOLDER, "server"))
    request = json.dumps(request).encode(errors="surrogateescape")
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    answers = server.makefile("r")
    child = int(answers.readline())
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda number, frame: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    for stream in (0, 1, 2):  # a reader of them waits for the program, not for this one
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    end(answers.readline())


def end(answer):
    """End as the program did."""
    status = int(answer) if answer else -signal.SIGKILL  # no answer: the server is gone
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    os._exit(status)


main()
