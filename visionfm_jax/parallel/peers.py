"""The processes of a run watch each other: when one is killed, stopped or fails, all end, and each says which it was.

Process 0 listens at the coordinator's address until all have come; each of the others keeps one TCP connection to it
for as long as the run lasts. The kernel closes the connections of a process that dies, whatever it dies of; a process
that sends nothing for `SILENCE` seconds is stopped, or its machine or network is gone. Process 0 passes on what has
happened, and every process ends by `os._exit` in the thread that watches, as its main thread waits in a collective.

`jax.distributed` notices too, but ends every process with a C++ stack that names nobody, within milliseconds when
process 0 dies. So it must not be the first: its timeout is longer than `SILENCE`, and the other processes reach its
service through `parallel/relay.py`, whose near end stays open when process 0 is gone.

Nothing here is authenticated, as little as JAX's own service is: see SECURITY.md.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import json
import multiprocessing
import os
import selectors
import socket
import threading
import time
from typing import Any, NoReturn

from visionfm_jax.errors import ConfigError, LostError, complain
from visionfm_jax.parallel import relay

BEAT = 5.0  # seconds between two signs of life
# Longer than the longest call that holds Python's lock (serialising a large program takes seconds), and short enough
# that a run ends within two minutes.
SILENCE = 90.0
TEXT = 1000  # characters of a text that is sent; the beginning says what happened
LONGEST = 1 << 14  # bytes of a message, of a character up to 12; more is not from a process of this run
PATIENCE = 300  # seconds that a process which is done waits for the others, as JAX does


class Peers:
    """The other processes of this run, as long as they live. Returns when all have come.

    Args:
      coordinator: "host:port" of process 0.
      process, processes: which this is, of how many.
      timeout: seconds that all have to come.

    Raises:
      LostError: process 0, or others, did not come in time, or this machine has nothing left for a relay.
      ConfigError: process 0 cannot listen there.
    """

    def __init__(self, coordinator: str, process: int, processes: int, timeout: float) -> None:
        self.process, self.processes = process, processes
        self.ending = False  # this process ends of itself: what happens to the others no longer matters
        self._links: dict[int, _Link] = {}  # by process; of process 0 alone in all others
        self._met, self._done, self._over = threading.Event(), threading.Event(), threading.Event()
        self._selector = selectors.DefaultSelector()
        end = time.monotonic() + timeout
        if process == 0:
            self._listener: socket.socket | None = listen(coordinator, end)
            self.address, self.bind_address = _own_addresses(self._listener)
            self._selector.register(self._listener, selectors.EVENT_READ)
        else:
            self._listener = None
            sock, there = _connect(coordinator, end, timeout)
            link = _Link(sock)
            link.send(process=process, processes=processes, host=socket.gethostname())
            self._adopt(link, 0, coordinator.rpartition(":")[0])
            try:
                self._relay, port = relay.start(*there[:2])  # it ends when this object does
            except OSError as error:
                raise LostError(
                    f"process {process}: its relay to {coordinator} cannot be started ({error}); see whether this "
                    "machine has memory and process numbers left, then start the same command again"
                ) from error
            self.address, self.bind_address = f"127.0.0.1:{port}", None
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        # Process 0 knows who is missing and says so to those who wait; they wait a little longer than it does.
        if not self._met.wait(max(end - time.monotonic(), 1) + (10 if process else 0)):
            missing = _numbers(sorted(set(range(1, processes)) - self._links.keys())) if process == 0 else "others"
            self.fail(
                LostError.exit_code,
                f"no cluster after {timeout:g} s: {coordinator} answers, but {missing} of {processes} did not come; "
                "see their logs, and whether they can reach that address",
            )

    def fail(self, code: int, text: str) -> NoReturn:
        """End every process of the run with `code`; this one has said why, or says it now."""
        self.ending = True
        complain(f"error: process {self.process}: {text}")
        self.end(code, text)

    def end(self, code: int, text: str) -> NoReturn:
        """As `fail`, of a process that has already said what happened."""
        self.ending = True
        if self.process == 0:
            text = f"process 0 on {socket.gethostname()} has ended with code {code}: {text}"
        for link in list(self._links.values()):
            link.send(end=code, text=text)
        time.sleep(0.5)  # for what is on its way
        exit_now(code)

    def close(self) -> None:
        """Say that this process is done, and wait until all are; they are still watched meanwhile."""
        self._done.set()
        if self.process:
            self._links[0].send(done=True)
        self._over.wait(PATIENCE)

    def _watch(self) -> None:
        looked = beaten = time.monotonic()
        self._pause = 0.0  # between the last two looks
        while not self._over.is_set():
            ready = self._selector.select(timeout=BEAT / 5)
            now = time.monotonic()
            self._pause, looked = now - looked, now
            if self._pause > 2 * BEAT:  # this process itself stood still: what it has not heard is no sign
                for link in self._links.values():
                    link.heard += self._pause
                ready = self._selector.select(timeout=0)  # the first may have been interrupted
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            for process, link in list(self._links.items()):
                if now - link.heard > SILENCE:
                    self._lost(process, f"has not answered for {SILENCE:g} s: stopped, or cut off from the network")
            if now - beaten >= BEAT:
                beaten = now
                for link in list(self._links.values()):
                    link.beat()
            if self.process == 0 and self._done.is_set() and all(link.done for link in self._links.values()):
                for link in self._links.values():
                    link.send(over=True)
                self._over.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # gone again
            link = _Link(self._listener.accept()[0])
            self._selector.register(link.sock, selectors.EVENT_READ, link)

    def _adopt(self, link: _Link, process: int, host: str) -> None:
        link.process, link.host = process, host
        self._links[process] = link
        if self.process:
            self._selector.register(link.sock, selectors.EVENT_READ, link)

    def _read(self, link: _Link) -> None:
        messages, open_ = link.read()  # what came before the end of the connection counts
        for message in messages:
            if link.process is None:
                if not self._greet(link, message):
                    open_ = False
                    break
            elif "end" in message:
                self._ended(link, message)
            elif "done" in message:
                link.done = True
            elif "over" in message:
                self._over.set()
            elif "met" in message:
                link.host = str(message["met"])
                self._met.set()
            if self._over.is_set():
                break
        if not open_:
            self._selector.unregister(link.sock)
            link.sock.close()
            if link.process is not None and not self._over.is_set():
                self._lost(link.process, "has died: killed, crashed, or its machine failed")

    def _greet(self, link: _Link, hello: dict[str, Any]) -> bool:
        """The first message of a process that has come; returns whether it is one of this run."""
        process, processes, host = (hello.get(key) for key in ("process", "processes", "host"))
        free = isinstance(process, int) and 0 < process < self.processes and process not in self._links
        if processes != self.processes or not free:
            text = f"process {process} of {processes} came from {host} to a run of {self.processes} processes"
            text += "" if free else ", of which it is none or a second one"
            link.send(end=ConfigError.exit_code, text=f"{text}; is another run at the same address?")
            return False
        self._adopt(link, process, str(host))
        if len(self._links) == self.processes - 1:
            self._selector.unregister(self._listener)
            self._listener.close()  # JAX's service listens at this address from now on
            for other in self._links.values():
                other.send(met=socket.gethostname())
            self._met.set()
        return True

    def _ended(self, link: _Link, message: dict[str, Any]) -> None:
        code, text = int(message["end"]) & 0xFF, str(message.get("text"))
        if self.process == 0:
            text = f"process {link.process} on {link.host} has ended with code {code}: {text}"
        self._judge(code, text)

    def _lost(self, process: int, what: str) -> None:
        remedy = "the same command continues from the last checkpoint"
        self._judge(LostError.exit_code, f"process {process} on {self._links[process].host} {what}; {remedy}")

    def _judge(self, code: int, text: str) -> None:
        """Something has happened: process 0 says so to all, and everyone ends."""
        if self.ending:
            return
        self.ending = True
        if self._pause > SILENCE / 2:  # they have counted from the last sign of life
            text = f"this process was suspended for {self._pause:.0f} s, and the others have ended meanwhile"
        if self.process == 0:
            for link in self._links.values():
                link.send(end=code, text=text)
        complain(f"error: process {self.process}: {text}")
        time.sleep(0.5)  # as in `end`
        exit_now(code)


def exit_now(code: int) -> NoReturn:
    """End this process, whatever its threads wait for, and those that load data for it."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


class _Link:
    """A connection to another process: lines of JSON, and empty lines as signs of life."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.process: int | None = None  # not yet said
        self.host = ""
        self.heard = time.monotonic()
        self.done = False
        self._rest = b""

    def send(self, **message: object) -> None:
        cut = {key: value[:TEXT] if isinstance(value, str) else value for key, value in message.items()}
        with contextlib.suppress(OSError):  # of a dead process `read` notices it
            self.sock.send(json.dumps(cut).encode() + b"\n")

    def beat(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.send(b"\n")

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """All messages that have come, and whether the connection is still one to a process of this package."""
        data, ended = b"", True
        try:
            while (part := self.sock.recv(1 << 16)) and len(data) < 1 << 20:
                data += part
        except BlockingIOError:
            ended = False
        except OSError:
            pass
        if data:
            self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines if line]
        except (ValueError, RecursionError):
            return [], False
        ours = len(self._rest) <= LONGEST and all(isinstance(message, dict) for message in messages)
        return messages if ours else [], ours and not ended


def host_and_port(coordinator: str) -> tuple[str, int]:
    """Host and port of "host:port", "[ipv6]:port"."""
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def join(host: str, port: int) -> str:
    """The reverse of `host_and_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listen(coordinator: str, end: float = 0.0) -> socket.socket:
    """A socket that listens at this address alone.

    Only where the name leads nowhere else, as on machines that know themselves as 127.0.1.1, or behind a translated
    address, it listens on all interfaces, and says so.

    Args:
      coordinator: "host:port".
      end: until when (by `time.monotonic`) a name may be unknown: those of pods appear after they have started.

    Raises:
      ConfigError: the name stays unknown, or the port is taken.
    """
    host, port = host_and_port(coordinator)
    while True:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            break
        except socket.gaierror as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"coordinator = {coordinator!r}: its name is not known here ({error.strerror}); give its address"
                ) from error
            time.sleep(0.5)
    try:
        if ipaddress.ip_address(address[0].partition("%")[0]).is_loopback and not _is_loopback(host):
            raise OSError(errno.EADDRNOTAVAIL, f"it is {address[0]} here, which no other machine reaches")
        return socket.create_server(address, family=family, backlog=4096)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno != errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"coordinator = {coordinator!r}: process 0 cannot listen on port {port} ({reason}); choose another port"
            ) from error
    complain(f"{coordinator}: {reason}; listening on all interfaces")
    return socket.create_server(("", port), backlog=4096)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.split(".")[0] == "localhost"


def _own_addresses(listener: socket.socket) -> tuple[str, str]:
    """Where process 0 itself reaches the service that takes this socket's place, and where that binds."""
    host, port = listener.getsockname()[:2]
    return join("127.0.0.1" if host == "0.0.0.0" else host, port), join(host, port)


def _connect(coordinator: str, end: float, timeout: float) -> tuple[socket.socket, tuple]:
    """A connection to process 0, and its address."""
    while True:
        try:
            sock = socket.create_connection(host_and_port(coordinator), timeout=5)
            there = sock.getpeername()
            if sock.getsockname() != there:
                return sock, there
            sock.close()  # a free port of this machine may be connected to itself
        except OSError as error:
            if time.monotonic() > end:
                raise LostError(
                    f"no cluster after {timeout:g} s: {coordinator} does not answer ({error.strerror or error}); check "
                    "that process 0 runs, its address, and the firewall between the hosts"
                ) from error
        time.sleep(0.2)


def _numbers(processes: list[int]) -> str:
    return ("process " if len(processes) == 1 else "processes ") + ", ".join(map(str, processes))
