"""An object store of this machine, and a proxy before it that fails on purpose."""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "bucket"


@dataclass
class Proxy:
    """Attributes:
    url: of the proxy.
    fault: (number of the request for a part or whole of an object, its path) -> "", "5xx", "cut", "slow" or "403".
    connections, requests: that it has seen; `requests` are those for objects.
    faults: that it has made, by kind.
    """

    url: str = ""
    fault: Callable[[int, str], str] = lambda number, path: ""
    connections: int = 0
    requests: int = 0
    faults: list[str] = field(default_factory=list)
    latency: float = 0.0  # seconds before each answer


@contextlib.contextmanager
def object_store(patch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A bucket, which clients of this process and its children reach through the proxy."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    proxy, lock = Proxy(), threading.Lock()
    host, port = server.get_host_and_port()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            with lock:
                proxy.connections += 1
            self.behind = http.client.HTTPConnection(host, port)

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.behind.request(self.command, self.path, body, dict(self.headers))
            answer = self.behind.getresponse()
            content = answer.read()
            is_object = self.command == "GET" and "list-type" not in self.path
            time.sleep(proxy.latency)
            fault = ""
            with lock:
                if is_object:
                    proxy.requests += 1
                    fault = proxy.fault(proxy.requests, self.path)
                    proxy.faults += [fault] * bool(fault)
            if fault in ("5xx", "403"):
                code = {"5xx": (503, "ServiceUnavailable"), "403": (403, "AccessDenied")}[fault]
                content = f"<Error><Code>{code[1]}</Code><Message>on purpose</Message></Error>".encode()
                self.send_response(code[0])
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                return
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            if fault:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                if fault == "slow":
                    time.sleep(1.0)
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: object) -> None:  # clients go away
            pass

    front = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    proxy.url = f"http://127.0.0.1:{front.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(name, value)
    # moto keeps what it holds for the whole process: also what another module has put there
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
    try:
        yield proxy
    finally:
        front.shutdown()
        front.server_close()
        server.stop()


def upload(folder: Path, prefix: str) -> str:
    """The URL of a copy of a folder."""
    client = boto3.client("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    return f"s3://{BUCKET}/{prefix}"
