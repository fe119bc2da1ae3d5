"""Who died, stopped or failed is named by all others, and the address that they meet at is the only one listened at."""

import select
import signal
import socket
import subprocess
import sys
import time

import pytest

from visionfm_jax.errors import ConfigError, LostError
from visionfm_jax.parallel import peers, relay

HOST = socket.gethostname()
# A process of a run that says "met", and does what it is sent.
PROCESS = """
import sys
from visionfm_jax.parallel import peers
peers.BEAT, peers.SILENCE = 0.2, 1.5
me = peers.Peers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 20)
print("met", flush=True)
word = sys.stdin.readline().strip()
if word == "fail":
    me.fail(2, "the disk is gone")
me.close()
print("done", flush=True)
"""


@pytest.fixture
def start():
    """Start processes 0 .. N-1 that meet; all are killed in the end."""
    started = []

    def start(count, *, numbers=None, where=None):
        where = where or f"127.0.0.1:{free_port()}"
        run = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, where, str(p), str(count)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for p in (range(count) if numbers is None else numbers)
        ]  # fmt: skip
        started.extend(run)
        return run

    yield start
    for process in started:
        process.kill()
        process.communicate()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def met(run):
    assert [process.stdout.readline() for process in run] == ["met\n"] * len(run)


def say(process, word):
    process.stdin.write(f"{word}\n")
    process.stdin.flush()


def ends(process, code, words):
    """Of a survivor: this exit code, and one line."""
    _, err = process.communicate(timeout=20)
    assert process.returncode == code, err
    (line,) = err.splitlines()
    assert line.startswith("visionfm_jax: error: process ")
    assert words in line


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "has not answered for 1.5 s")]
)
def test_the_lost_process_is_named_by_all_others(start, lost, number, words):
    run = start(3)
    met(run)
    run[lost].send_signal(number)
    for process in run:
        if process is not run[lost]:
            ends(process, 71, f"process {lost} on {HOST} {words}")
    if number == signal.SIGSTOP:  # woken, it does not accuse the others
        run[lost].send_signal(signal.SIGCONT)
        ends(run[lost], 71, "this process was suspended for ")


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_ends_all_with_its_code_and_words(start, failing):
    run = start(3)
    met(run)
    say(run[failing], "fail")
    ends(run[failing], 2, f"process {failing}: the disk is gone")
    for process in run:
        if process is not run[failing]:
            ends(process, 2, f"process {failing} on {HOST} has ended with code 2: the disk is gone")


def test_words_that_come_at_once_with_the_end_of_the_connection_are_all_read(start):
    """A slow process finds "met", the reason of the end and the end itself in one look."""
    with socket.create_server(("127.0.0.1", 0)) as process0:
        (process,) = start(2, numbers=[1], where=f"127.0.0.1:{process0.getsockname()[1]}")
        link, _ = process0.accept()
        with link:
            link.sendall(b'{"met": "h0"}\n{"end": 75, "text": "process 0 on h0 has ended with code 75: \\u001b[2J"}\n')
        ends(process, 75, r"process 0 on h0 has ended with code 75: \x1b[2J")  # and no terminal obeys them


def test_all_wait_for_the_last_to_be_done_and_end_quietly(start):
    run = start(3)
    met(run)
    say(run[0], "close")
    say(run[1], "close")
    with pytest.raises(subprocess.TimeoutExpired):
        run[0].wait(0.5)
    assert run[1].poll() is None
    say(run[2], "close")
    for process in run:
        assert process.communicate(timeout=20) == ("done\n", "")
        assert process.returncode == 0


def test_a_run_that_was_stopped_as_a_whole_goes_on(start):
    """Ctrl-Z and fg."""
    run = start(2)
    met(run)
    for number, pause in ((signal.SIGSTOP, 2.5), (signal.SIGCONT, 0.5)):
        for process in run:
            process.send_signal(number)
        time.sleep(pause)
    assert [process.poll() for process in run] == [None, None]


def test_strangers_do_not_join_and_do_no_harm(start):
    port = free_port()
    (zero,) = start(3, numbers=[0], where=f"127.0.0.1:{port}")
    strangers = []
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100_000, b"[" * 5000 + b"\n", b'{"end": 1}\n', b"7\n", b""):
        strangers.append(connected(port))
        strangers[-1].sendall(words)
    (one,) = start(3, numbers=[1], where=f"127.0.0.1:{port}")
    (twin,) = start(3, numbers=[1], where=f"127.0.0.1:{port}")
    (other,) = start(2, numbers=[1], where=f"127.0.0.1:{port}")
    ends(other, 2, f"process 1 of 2 came from {HOST} to a run of 3 processes")
    # Either of the twins may be the first.
    while one.poll() is None and twin.poll() is None:
        time.sleep(0.05)
    second, first = (one, twin) if one.poll() is not None else (twin, one)
    ends(second, 2, "of which it is none or a second one; is another run at the same address?")
    (two,) = start(3, numbers=[2], where=f"127.0.0.1:{port}")
    met([zero, first, two])
    for stranger in strangers:
        stranger.close()
    with pytest.raises(ConnectionRefusedError):  # all have come: the address is free for JAX
        socket.create_connection(("127.0.0.1", port))


def connected(port):
    end = time.monotonic() + 20
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_it_listens_at_the_given_address_alone(capsys):
    with peers.listen(f"127.0.0.1:{free_port()}") as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    with peers.listen(f"localhost:{free_port()}") as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.1.1", "which no other machine reaches"), ("192.0.2.7", "assign requested address")]
)
def test_a_name_that_leads_elsewhere_is_said(monkeypatch, capsys, address, reason):
    """A machine that knows its own name as 127.0.1.1, as Debian's do, or that others reach by a translated address."""
    port = free_port()
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with peers.listen(f"node7:{port}") as listener:
        assert listener.getsockname()[0] == "0.0.0.0"
    line = capsys.readouterr().err
    assert reason in line
    assert line.endswith("listening on all interfaces\n")


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="its name is not known here"):
        peers.listen("no-such-host.invalid:12345")


@pytest.fixture
def relayed():
    """A server, and a connection to it through a relay: the server, its end, the other end, the relay."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        process, port = relay.start(*server.getsockname())
        with socket.create_connection(("127.0.0.1", port)) as near:
            far, _ = server.accept()
            with far:
                yield server, far, near, process
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_a_relay_stays_open_when_the_far_end_closes(relayed):
    server, far, near, process = relayed
    near.sendall(b"to")
    assert far.recv(10) == b"to"
    far.sendall(b"fro")
    assert near.recv(10) == b"fro"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # sent to a whole group
        process.send_signal(number)
    far.close()
    server.close()
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(10)
    near.sendall(b"more")


def test_the_near_end_of_a_relay_closes_the_far_one_and_its_process_ends_with_ours(relayed):
    _, far, near, process = relayed
    near.close()
    far.settimeout(5)
    assert far.recv(10) == b""
    process.stdin.close()  # as when this process dies
    assert process.wait(5) == 0


@pytest.mark.parametrize(("python", "words"), [("/bin/false", "ended with code 1"), ("/no/python", "No such file")])
def test_a_relay_that_does_not_start_is_one_line(monkeypatch, python, words):
    monkeypatch.setattr(sys, "executable", python)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(LostError, match=rf"its relay to 127\.0\.0\.1:\d+ cannot be started \(.*{words}.*\); see"),
    ):
        peers.Peers(f"127.0.0.1:{server.getsockname()[1]}", 1, 2, timeout=5)


@pytest.mark.parametrize("sign", ["\u0800", "\U0001f600", "\x01", "x"])
def test_a_long_text_is_cut_and_understood_however_it_arrives(sign):
    text = 5000 * sign
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as first,
        server.accept()[0] as second,
    ):
        sender, reader = peers._Link(first), peers._Link(second)
        sender.send(end=4, text=text)
        second.setblocking(True)
        content = second.recv(1 << 20)
        second.setblocking(False)
        for part, messages in ((content[:-1], []), (content[-1:], [{"end": 4, "text": text[:1000]}])):
            first.send(part)
            select.select([second], [], [], 5)
            assert reader.read() == (messages, True)


def test_addresses():
    assert peers.host_and_port("[fd00::1]:80") == ("fd00::1", 80)
    assert peers.join(*peers.host_and_port("[fd00::1]:80")) == "[fd00::1]:80"
    assert peers.join(*peers.host_and_port("node7:80")) == "node7:80"
