"""A port of the loopback interface that leads elsewhere, and whose connections stay open when the far end closes them.

The client of `jax.distributed` aborts its process in the moment its connection is closed; behind this it does not see
that. It is a process of its own, started by the one that needs it: the threads of that one may all wait for an answer
that comes through here, one of them with Python's lock. This file is run as a program: it imports nothing of the
package.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def start(host: str, port: int) -> tuple[subprocess.Popen, int]:
    """The process, which ends with this one or when its stdin is closed, and the port where it listens.

    Raises:
      OSError: it cannot be started, or does not live long enough to listen.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    if port := process.stdout.readline():
        return process, int(port)
    raise ChildProcessError(f"it has ended with code {process.wait()}")


def main(host: str, port: str) -> None:
    """Relay until stdin ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for the process that uses this one
        signal.signal(number, signal.SIG_IGN)
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)
    threading.Thread(target=_serve, args=(server, (host, int(port))), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def _serve(server: socket.socket, target: tuple[str, int]) -> None:
    kept: list[socket.socket] = []  # else collected, and closed
    while True:
        near, _ = server.accept()
        far = _reach(target)
        if far is None:
            near.close()
            continue
        kept.extend((near, far))
        threading.Thread(target=_pump, args=(far, near), daemon=True).start()
        threading.Thread(target=_pump, args=(near, far), kwargs={"close": True}, daemon=True).start()


def _reach(target: tuple[str, int], seconds: float = 60) -> socket.socket | None:
    """A connection; JAX's service may need a moment to listen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            sock = socket.create_connection(target, timeout=5)
            sock.settimeout(None)
            return sock
        time.sleep(0.1)
    return None


def _pump(source: socket.socket, sink: socket.socket, *, close: bool = False) -> None:
    for sock in (source, sink):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        if close:
            sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    main(*sys.argv[1:])
