"""A proxy that stands between boto3 and an S3 server on loopback and makes
faults, for each request by a policy.

Bytes pass unchanged, the Host header included, so that signatures stay valid. Knows as much HTTP/1.1 as these
two speak: keep-alive, Content-Length and chunked bodies, `Expect: 100-continue`. Bodies are held in memory.
"""

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

REFUSAL_SECONDS = 0.2
PIECES, PIECE_SECONDS = 8, 0.01


class Fault(Enum):
    """What happens to a request."""

    NONE = "it is forwarded, and so is its answer"
    SLOW = "the answer comes in pieces, with pauses"
    REFUSE = (
        "the connection is reset, and new ones are refused for a moment, as by a server that starts again"
    )
    RESET = "the connection is reset when half of the body has arrived"
    ERROR = "500 InternalError; the server never hears of the request"
    SLOW_DOWN = "503 SlowDown; the server never hears of the request"
    TRUNCATE = "the connection closes after half of the answer's body"
    LOSE_REPLY = "the server does it, but the connection is reset instead of an answer"
    SILENCE = "the connection stays open, and nothing ever comes, as behind a cut cable"
    EXPIRED = "403 ExpiredToken; the server never hears of the request"
    SKEWED = "403 RequestTimeTooSkewed; the server never hears of the request"


Policy = Callable[[str, str, int], Fault]
"""Of a request's method, its path with the query, and which try of that method and path it is, from 1."""
_ERRORS = {
    Fault.ERROR: (500, "InternalError"),
    Fault.SLOW_DOWN: (503, "SlowDown"),
    Fault.EXPIRED: (403, "ExpiredToken"),
    Fault.SKEWED: (403, "RequestTimeTooSkewed"),
}
SURVIVED = (
    Fault.SLOW,
    Fault.REFUSE,
    Fault.RESET,
    Fault.ERROR,
    Fault.SLOW_DOWN,
    Fault.TRUNCATE,
    Fault.LOSE_REPLY,
)
"""What trying again mends, within seconds."""


def no_faults(method: str, path: str, count: int) -> Fault:  # noqa: ARG001 - a Policy
    """Forwards everything."""
    return Fault.NONE


def on_first_try(fault: Fault, method: str = "", part: str = "") -> Policy:
    """The fault for the first try of every request, or of those with that
    method and that part in their path."""
    return lambda m, path, count: fault if count == 1 and method in ("", m) and part in path else Fault.NONE


def random_faults(seed: int, rate: float, faults: Sequence[Fault] = SURVIVED) -> Policy:
    """Faults at that rate, drawn for each request on its own, so that racing
    threads do not change what they meet."""

    def decide(method: str, path: str, count: int) -> Fault:
        draw = random.Random(f"{seed} {method} {path} {count}")
        return draw.choice(faults) if draw.random() < rate else Fault.NONE

    return decide


class FaultProxy:
    """The proxy, in a thread of its own while its `with` block lasts.

    Whatever opens and shuts its port runs in the loop without a pause, so that no two of them come between
    each other.
    """

    def __init__(self, target: str, policy: Policy = no_faults) -> None:
        self._target = urlsplit(target)
        self._connections: dict[asyncio.Task[None], socket.socket] = {}
        self._forwarding: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._accepts = False
        self._resuming: asyncio.TimerHandle | None = None
        self._mistakes: list[dict[str, Any]] = []
        self.follow(policy)

    def __enter__(self) -> "FaultProxy":
        self._socket = _bound(0)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda _, context: self._mistakes.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")
        self._thread.start()
        self.accept()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._socket.close()
        assert not self._mistakes, self._mistakes  # such as a policy that raised

    def follow(self, policy: Policy) -> None:
        """Takes another policy, and counts tries anew."""
        self._policy, self._tries = policy, Counter[tuple[str, str]]()
        self.seen: list[tuple[str, str, Fault]] = []

    def refuse(self) -> None:
        """Drops every connection and refuses new ones, until `accept`."""

        async def dropped() -> None:
            self._accepts = False
            self._shut()
            if self._connections:
                await asyncio.wait(self._connections)

        asyncio.run_coroutine_threadsafe(dropped(), self._loop).result()

    def accept(self) -> None:
        """Accepts connections, as it does from the start."""

        async def opened() -> None:
            self._accepts = True
            self._open()

        asyncio.run_coroutine_threadsafe(opened(), self._loop).result()

    def _open(self) -> None:
        self._socket.listen(128)
        self._loop.add_reader(self._socket, self._take_connection)

    def _shut(self, pause: float | None = None) -> None:
        """Stops listening, for that many seconds or for good, and drops all
        connections but the one that asks for it."""
        if self._resuming:
            self._resuming.cancel()
        self._resuming = None
        if pause is not None and self._accepts:
            self._resuming = self._loop.call_later(pause, self._open)
        self._loop.remove_reader(self._socket)
        with suppress(OSError):  # it does not listen
            self._socket.shutdown(socket.SHUT_RDWR)  # also the copies in children that are being started
        port_keeper = _bound(self._socket.getsockname()[1])  # without listening: refuses, and keeps the port
        self._socket.close()
        self._socket = port_keeper
        for task, connection in self._connections.items():
            if task is not asyncio.current_task():
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)
                if task in self._forwarding:
                    self._forwarding[task].transport.abort()

    def _take_connection(self) -> None:
        with suppress(BlockingIOError, ConnectionError):  # the client left meanwhile
            connection, _ = self._socket.accept()
            # asyncio does so only where it made the socket; else a body waits 40 ms for its head's acknowledgement.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = self._loop.create_task(self._serve(connection))
            self._connections[task] = connection
            task.add_done_callback(self._connections.pop)

    async def _serve(self, connection: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            # Either side may go away at any time.
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Serves one request. Whether the connection stays open for another."""
        head = await reader.readuntil(b"\r\n\r\n")
        method, path, _ = head.decode("latin-1").split(" ", 2)
        self._tries[method, path] += 1
        fault = self._policy(method, path, self._tries[method, path])
        self.seen.append((method, path, fault))
        if fault is Fault.REFUSE:
            self._shut(REFUSAL_SECONDS)
            return _reset(writer)
        if _header(head, "expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.RESET:
            await reader.readexactly(int(_header(head, "content-length") or 0) // 2)
            return _reset(writer)
        body = await _read_body(reader, head)
        if fault is Fault.SILENCE:
            await reader.read()  # until the client gives up
            return False
        if fault in _ERRORS:
            writer.write(_error(*_ERRORS[fault], with_body=method != "HEAD"))
            return True
        head, body = await self._forward(method, head + body)
        if fault is Fault.LOSE_REPLY or (fault is Fault.TRUNCATE and not body):
            return _reset(writer)
        writer.write(head)
        if fault is Fault.TRUNCATE:
            writer.write(body[: len(body) // 2])
            return False
        piece_bytes = -(-len(body) // PIECES) if fault is Fault.SLOW else len(body)
        for start in range(0, len(body), piece_bytes or 1):
            await asyncio.sleep(PIECE_SECONDS if fault is Fault.SLOW else 0)
            writer.write(body[start : start + piece_bytes])
            await writer.drain()
        return True

    async def _forward(self, method: str, request: bytes) -> tuple[bytes, bytes]:
        """Head and body of the server's answer."""
        reader, writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        task = asyncio.current_task()
        assert task is not None
        self._forwarding[task] = writer
        try:
            writer.write(request)
            head = b" 100 "
            while head.split(b" ")[1] == b"100":  # the client has been told to continue
                head = await reader.readuntil(b"\r\n\r\n")
            return head, b"" if method == "HEAD" else await _read_body(reader, head)
        finally:
            del self._forwarding[task]
            writer.close()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    bound.setblocking(False)
    return bound


def _reset(writer: asyncio.StreamWriter) -> bool:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return False


def _error(status: int, code: str, with_body: bool) -> bytes:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>made by a test</Message></Error>"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return (head + body * with_body).encode()


def _header(head: bytes, name: str) -> str:
    """A header's value in lower case, or nothing."""
    lines = (line.partition(":") for line in head.decode("latin-1").lower().split("\r\n")[1:])
    return next((value.strip() for key, _, value in lines if key == name), "")


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """A body as it is on the wire, with its chunk sizes and trailers."""
    if _header(head, "transfer-encoding") != "chunked":
        return await reader.readexactly(int(_header(head, "content-length") or 0))
    raw, size = b"", 1
    while size:
        line = await reader.readuntil(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        raw += line + (await reader.readexactly(size + 2) if size else b"")
    while line != b"\r\n":  # trailers
        line = await reader.readuntil(b"\r\n")
        raw += line
    return raw
