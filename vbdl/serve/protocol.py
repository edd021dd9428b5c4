"""The HTTP protocol of one connection: uvicorn's, with one time limit for every step of a client."""

import asyncio
from collections.abc import Callable

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from vbdl.serve.limits import Limits
from vbdl.types import Json

PROBES = ("/health", "/ready", "/metrics")
_GRACE = 0.5  # seconds beyond the limit, in which the application may itself refuse a slow body


class Patient(HttpToolsProtocol):
    """A connection that is closed when its client takes too long to send headers, to send a body (on any route), to
    send its next request, or to read an answer.

    reserved: whether the connection is reserved for probes; it then answers one request, and only a probe.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: Json,
        *,
        limits: Limits,
        reserved: bool = False,
        ended: Callable[[], None] = lambda: None,
    ):
        super().__init__(config, server_state, app_state)
        self._limits, self._reserved, self._ended = limits, reserved, ended
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None  # runs while the client does not read an answer
        self._seen = 0  # bytes since the last complete headers, or since the start
        self._receiving = False  # between the first byte of a request and its last
        self._headers = True  # whether headers are expected or incomplete

    # -- what uvicorn calls

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._unread is not None:
            self._unread.cancel()
        self._ended()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._headers:
            self._seen += len(data)
            # one read more than the limit is allowed: it may hold a part of a body
            if self._seen > self._limits.header_bytes + 2**18:
                self.transport.abort()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = True
        if self.cycle is not None or self._timer is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._headers, self._seen = False, 0
        self._wait(_GRACE)
        super().on_headers_complete()
        if self._reserved and self.cycle is not None:
            self.cycle.keep_alive = False
            if self.scope.get("path") not in PROBES:
                self._refuse(503, "all connections are taken; try again in 1 s", "retry-after: 1\r\n")

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving, self._headers, self._seen = False, True, 0
        self._stop()
        if self.cycle is not None and self.cycle.response_complete:
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()  # uvicorn's timer restarts with every byte; the timer here does not
        if not self._receiving and self.cycle.response_complete:  # and no pipelined request has begun
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = asyncio.get_running_loop().call_later(self._limits.body_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    # -- time limits

    def _wait(self, more: float = 0.0) -> None:
        self._stop()
        self._timer = asyncio.get_running_loop().call_later(self._limits.body_seconds + more, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.pipeline:  # the answer to an earlier request is late, not the client
            self._wait()
            return
        began = self.cycle is not None and (self.cycle.response_started or self.cycle.response_complete)
        if self.transport.is_closing() or not self._receiving or self._headers or began:
            self.transport.abort()  # close() would wait until such a client has read everything
            return
        self._refuse(408, f"the body took longer than {self._limits.body_seconds:g} s")

    def _refuse(self, status: int, message: str, more: str = "") -> None:
        """Send an error without the application, and close the connection."""
        body = f'{{"error":{{"code":"{"slow" if status == 408 else "busy"}","message":"{message}"}}}}'
        head = f"HTTP/1.1 {status} {'Request Timeout' if status == 408 else 'Service Unavailable'}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{more}connection: close\r\n\r\n"
        self.cycle.disconnected = True  # the application then takes the client for gone
        self.cycle.message_event.set()
        self.transport.write((head + body).encode())
        self.transport.close()
        asyncio.get_running_loop().call_later(1.0, self.transport.abort)
