"""Processes of `turbo-nb` that are forks of one, because importing what a clip needs takes a process 5 s.

A fork has the streams, the variables, the folder and the arguments of the process `python forks.py SOCKET ARGUMENTS`,
and ends like one of its own. That process waits for it and ends with its code. So a shell can redirect it. A test of
what happens while a process imports needs a process of its own.
"""

import gc
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Forks:
    """A server that listens on a socket in a folder."""

    def __init__(self, folder: Path):
        self.socket = folder / "socket"

    def command(self, *arguments: object) -> list[str]:
        """Return the command line that has the effect of `python ARGUMENTS`, with -c or -m turbo_nb.cli"""
        return [sys.executable, "-I", "-S", __file__, str(self.socket), *map(str, arguments)]

    def fork_of(self, process: subprocess.Popen) -> int:
        """Return the id of the fork of a process that has this command line"""
        return int(Path(f"{self.socket}.{process.pid}").read_text())


@contextmanager
def forks(folder: Path) -> Iterator[Forks]:
    """Start a server, and end it"""
    made = Forks(folder)
    server = subprocess.Popen([sys.executable, __file__, str(made.socket)], stdin=subprocess.DEVNULL)
    try:
        while not made.socket.exists():
            assert server.poll() is None, "the server of forks has ended"
            time.sleep(0.02)
        yield made
    finally:
        server.kill()
        server.wait()


def ask(path: str, arguments: list[str]) -> int:
    """Let the server make a fork with the streams of this process, and wait for it: its exit code"""
    streams = {number: number for number, one in enumerate((sys.stdin, sys.stdout, sys.stderr)) if one is not None}
    request = {"arguments": arguments, "open": [*streams], "folder": os.getcwd(), "process": os.getpid()}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        data = json.dumps(request | {"variables": dict(os.environ)}).encode()
        socket.send_fds(connection, [data[:1000]], [*streams])
        connection.sendall(data[1000:])
        connection.shutdown(socket.SHUT_WR)
        return int(connection.recv(100))


def serve(path: str) -> None:
    """Import what a clip needs, and answer requests. Returns in the forks, which then run their code."""
    gc.disable()  # which saves a fifth of the imports' time
    from diffusers import WanPipeline  # noqa: F401

    from turbo_nb import checkpoint, cli, generation  # noqa: F401

    gc.freeze()  # or each fork walks through the modules' objects at its end, and copies their pages
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.bound")
    listener.listen()
    os.rename(f"{path}.bound", path)
    while True:
        connection, _ = listener.accept()
        data, numbers, *_ = socket.recv_fds(connection, 1000, 3)
        while more := connection.recv(1 << 16):
            data += more
        request = json.loads(data)
        if not (process := os.fork()):
            gc.enable()
            connection.close()
            listener.close()
            kind, *arguments = become(request, numbers)
            sys.argv = [kind, *arguments[1:]]
            exec(arguments[0], {"__name__": "__main__"}) if kind == "-c" else cli.run()
            return
        for number in numbers:
            os.close(number)
        Path(f"{path}.{request['process']}").write_text(str(process))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
        connection.close()


def become(request: dict, numbers: list[int]) -> list[str]:
    """Take the streams, the variables and the folder of a request; return its arguments"""
    for number in range(3):
        os.close(number)
    for number, given in zip(request["open"], numbers, strict=True):
        os.dup2(given, number)
        os.close(given)
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["folder"])
    sys.stdin, sys.stdout, sys.stderr = (opened(number, request["open"]) for number in range(3))
    return request["arguments"]


def opened(number: int, those: list[int]):
    """Open a standard stream as Python does when it starts; None where it is closed"""
    if number not in those:
        return None
    usual = (sys.__stdin__, sys.__stdout__, sys.__stderr__)[number]
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    errors = usual.errors if number == 2 or not encoding else errors or "strict"
    return open(number, "r" if number == 0 else "w", encoding=encoding or usual.encoding, errors=errors, closefd=False)


if __name__ == "__main__":
    if sys.argv[2:]:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    sys.path.pop(0)  # this folder
    serve(sys.argv[1])
