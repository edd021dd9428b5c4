"""Answers prediction requests. It is plain ASGI without a framework, because every microsecond here counts in the
latency of a small model."""

import asyncio
import contextlib
import gc
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from vbdl.serve import arrow
from vbdl.serve.batching import Batcher
from vbdl.serve.bodies import Notes
from vbdl.serve.counted import LARGE
from vbdl.serve.limits import Gone, Limits, Refused
from vbdl.serve.metrics import Metrics
from vbdl.serve.model import Model
from vbdl.types import Prediction

ARROW = "application/vnd.apache.arrow.stream"
SAFE = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
_HEADERS = [(name.lower().encode(), value.encode()) for name, value in SAFE.items()]
# parses bodies of more than LARGE bytes one at a time, so that eight of them take the memory of one
_DECODING = ThreadPoolExecutor(1, "vbdl-serve-bodies")
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Serving:
    """The ASGI application of `POST /v1/predict`, with the state for health probes and the lifespan of the service."""

    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits, self.metrics = model, limits, Metrics()
        self.batcher: Batcher | None = None
        self.warm, self.failed = False, ""
        self._bytes = 0  # bytes of bodies that are being read or waiting

    @contextlib.asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[dict[str, "Serving"]]:
        self.batcher = Batcher(self.model.predictor, self.limits, self.metrics, self.model.anytime)
        warming = asyncio.create_task(self._warm_up())
        try:
            yield {"serving": self}  # the server reads it, and may wait until it is warm
        finally:
            warming.cancel()
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.close)

    async def _warm_up(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.model.warm_up)
            self.warm = True
            _log.info("ready to predict")
        except Exception as error:  # compiling may raise any error; the probes report it
            _log.exception("warming up failed")
            self.failed = f"{type(error).__name__}: warming up failed, see the log"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, with its prediction or a refusal. Raises Gone if the client leaves."""
        try:
            media, body = await self._predicted(dict(scope["headers"]), receive)
        except Refused as error:
            self.metrics.refused(error.code)
            await answer(error, send)
            return
        await respond(send, 200, media, body)

    async def _predicted(self, headers: dict[bytes, bytes], receive: Receive) -> tuple[str, bytes]:
        """Return (media type, body) of the answer to a request."""
        arrived = time.monotonic()
        if not self.warm or self.batcher is None:
            raise Refused(503, "not_ready", self.failed or self.model.preparing, retry_after=5)
        asked = headers.get(b"x-deadline-ms")
        seconds = self.limits.deadline if asked is None else self._deadline(asked.decode("latin-1"))
        if headers.get(b"content-encoding", b"identity") != b"identity":
            raise Refused(415, "compressed", "compressed bodies are not taken")
        media = headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
        held = [0]
        try:
            body = await self._body(headers, receive, held)
            read = partial(self.model.bodies.read, media, body, self.limits.rows)
            inputs, rows, notes = read() if len(body) <= LARGE else await _alone(read, arrived + seconds)
            del body, read  # frees the memory while the inputs wait
            prediction = await self.batcher.predict(inputs, rows, arrived + seconds, asked is not None, receive)
        finally:
            self._bytes -= held[0]
        epistemic = float(prediction.epistemic.sum())
        if not math.isfinite(epistemic):  # rare: an output beyond float32, or only one draw
            _refuse_not_finite(prediction)
            epistemic = float(prediction.epistemic.nan_to_num(0.0, 0.0, 0.0).sum())
        self.metrics.predicted(rows, epistemic)
        as_arrow = ARROW in headers.get(b"accept", b"").decode("latin-1")
        write = partial(self._write, prediction, notes, as_arrow)
        return await _beside(write) if rows * prediction.total[0].numel() > 256 else write()

    def _write(self, prediction: Prediction, notes: Notes, as_arrow: bool) -> tuple[str, bytes]:
        if as_arrow:
            return ARROW, arrow.write(self.model.columns(prediction))
        return "application/json", msgspec.json.encode(self.model.answer(prediction, notes))

    def _deadline(self, asked: str) -> float:
        """Return the deadline that the client asks for, in seconds."""
        if not (asked.isascii() and asked.isdigit() and len(asked) <= 9 and int(asked) >= 1):
            raise Refused(422, "bad_deadline", "X-Deadline-Ms is a whole number of milliseconds, at least 1")
        return min(int(asked) / 1000, self.limits.deadline)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, held: list[int]) -> bytes:
        """Read the body and count its bytes while reading, because the stated length may be wrong."""
        limits, chunks, size = self.limits, [], 0
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limits.body_bytes:
            raise Refused(413, "too_large", f"a body has at most {limits.body_bytes} bytes")
        try:
            async with asyncio.timeout(limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    chunk, more = message.get("body", b""), message.get("more_body", False)
                    size += len(chunk)
                    if size > limits.body_bytes:
                        raise Refused(413, "too_large", f"a body has at most {limits.body_bytes} bytes")
                    # only large bodies: the limit on connections bounds small ones, and large ones must not block them
                    if size > LARGE and self._bytes + len(chunk) > limits.total_bytes:
                        raise Refused(503, "busy", "too many bodies are being read; try again in 1 s", retry_after=1)
                    held[0] += len(chunk)
                    self._bytes += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, "slow", f"the body took longer than {limits.body_seconds:g} s") from None
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _refuse_not_finite(prediction: Prediction) -> None:
    """Raise Refused if a row's probabilities or mean are not finite."""
    means = prediction.mean if prediction.probs is None else prediction.probs
    finite = means.isfinite().flatten(1).all(1) if means.ndim > 1 else means.isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        reason = f"row {row}: the network's outputs are beyond what its floating-point type holds, or no numbers"
        raise Refused(422, "not_predictable", f"{reason}; {int((~finite).sum())} of {len(finite)} rows are so")


async def respond(send: Send, status: int, media: str, body: bytes, extra: dict[str, str] | None = None) -> None:
    """Send an answer with its headers."""
    headers = [
        *_HEADERS,
        (b"content-type", media.encode()),
        (b"content-length", str(len(body)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in (extra or {}).items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def answer(error: Refused, send: Send) -> None:
    """Send a refusal as an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # because the rest of the body is not read
    body = msgspec.json.encode({"error": {"code": error.code, "message": error.message}})
    await respond(send, error.status, "application/json", body, headers)


async def _beside(work: Callable[[], T]) -> T:
    """Run `work` in a thread, so that a large request does not hold up small ones."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _alone(read: Callable[[], T], deadline: float) -> T:
    """Parse a large body in the thread for large bodies, until a deadline on the clock of time.monotonic."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await asyncio.get_running_loop().run_in_executor(_DECODING, _uncollected, read)
    except TimeoutError:
        raise Refused(504, "deadline", "the deadline passed while a large body was read") from None


def _uncollected(read: Callable[[], T]) -> T:
    """Call `read` with the garbage collector paused: it would find no garbage in a body, and would stop all threads."""
    was = gc.isenabled()
    gc.disable()
    try:
        return read()
    finally:
        if was:
            gc.enable()
