"""A proxy in front of an S3 server that makes a share of the requests fail."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = ("error", "reset", "lost answer", "stall")


class FaultyProxy(ThreadingHTTPServer):
    """A proxy on a free port.

    The failures are errors (503), resets of the connection, stalls, and lost answers. A lost answer
    is a reset after the server has executed the request, the worst case for a conditional put.

    Args:
        port: the port of the server.
        share: the share of the requests that fail.
        stall: seconds of a stall.
        seed: seed of the choice of failures.
    """

    daemon_threads = True

    def __init__(self, port: int, share: float, stall: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port
        self.share = share
        self.stall = stall
        self.requests = 0
        self.faults = Counter[str]()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The URL of the proxy."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw_fault(self) -> str | None:
        """Return how the next request fails, or None."""
        with self._lock:
            self.requests += 1
            if self._random.random() >= self.share:
                return None
            kind = self._random.choice(KINDS)
            self.faults[kind] += 1
            return kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_any(self) -> None:
        body = self._body()
        fault = self.server.draw_fault()
        if fault == "error":
            message = "<Error><Code>ServiceUnavailable</Code><Message>fault</Message></Error>"
            self._answer(503, {}, message.encode())
        elif fault == "reset":
            self._reset()
        else:
            if fault == "stall":
                time.sleep(self.server.stall)
            status, headers, answer = self._forward(body)
            if fault == "lost answer":
                self._reset()
            else:
                self._answer(status, headers, answer)

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _body(self) -> bytes:
        """Read the request's body, which botocore may send in chunks."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        request_headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "connection", "expect")
        }
        request_headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body or None, request_headers)
        response = connection.getresponse()
        data = response.read()
        headers = dict(response.getheaders())
        connection.close()
        return response.status, headers, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = str(len(data))
        if self.command == "HEAD":
            # The answer has no body, but states the length of the object.
            length = headers.get("Content-Length", length)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        # A linger time of 0 makes the kernel send a reset instead of a regular end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""
