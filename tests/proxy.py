"""A proxy that stands before an S3 server and fails a share of the requests: an error, a reset, or a stall."""

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
    """Listens on a free port and hands on to `port`; `share` of the requests fail, as the seed decides.

    A lost answer is a reset after the server has done what was asked: the worst case for a conditional put.
    """

    daemon_threads = True

    def __init__(self, port: int, share: float, stall: float, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port, self.share, self.stall = port, share, stall
        self.requests, self.faults = 0, Counter[str]()
        self._drawn, self._lock = random.Random(seed), threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str | None:
        """How the next request fails, if it does."""
        with self._lock:
            self.requests += 1
            if self._drawn.random() >= self.share:
                return None
            kind = self._drawn.choice(KINDS)
            self.faults[kind] += 1
            return kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def handle_any(self) -> None:
        body = self._body()
        fault = self.server.fault()
        if fault == "error":
            self._answer(
                503, {}, b"<Error><Code>ServiceUnavailable</Code><Message>drawn</Message></Error>"
            )
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

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def _body(self) -> bytes:
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
        kept = {
            k: v
            for k, v in self.headers.items()
            if k.lower() not in ("transfer-encoding", "connection", "expect")
        }
        connection.request(
            self.command, self.path, body or None, kept | {"Content-Length": str(len(body))}
        )
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
        length = (
            headers.get("Content-Length", str(len(data)))
            if self.command == "HEAD"
            else str(len(data))
        )
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
