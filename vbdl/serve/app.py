"""The ASGI application: routes, the gate before them, and one request from its body to its answer."""

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from importlib.resources import files
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vbdl.serve import arrow
from vbdl.serve.batching import Batcher
from vbdl.serve.limits import Limits, Refused
from vbdl.serve.metrics import Metrics
from vbdl.serve.model import Model
from vbdl.serve.openapi import document

ARROW = "application/vnd.apache.arrow.stream"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_OPEN = ("/", "/page.css", "/page.js", "/health", "/ready")  # without a token: they tell nothing of the model
_LARGE = 64 * 2**10  # bytes that are read, and rows times fields that are written, beside the event loop from here on
_log = logging.getLogger(__name__)


def app(
    model: Model, limits: Limits | None = None, *, token: str | None = None, hosts: Sequence[str] | None = None
) -> Starlette:
    """The service of a model, for any ASGI server.

    token: asked for as `Authorization: Bearer ...` by everything but the page and the probes.
    hosts: names that the Host header may have, without a port; LOOPBACK keeps web pages of other origins from reaching
        a service on the same machine by a name of their own. None: any.
    """
    service = _Service(model, limits or Limits())
    get = lambda path, endpoint: Route(path, endpoint, methods=["GET"])
    page = files("vbdl.serve") / "page"
    static = lambda name, media: _static((page / name).read_bytes(), media)
    described = _json(document(model, service.limits, token is not None))
    made = Starlette(
        routes=[
            Route("/v1/predict", service.predict, methods=["POST"]),
            get("/v1/model", lambda _: _json(model.about())),
            get("/openapi.json", lambda _: described),
            get("/health", service.health),
            get("/ready", service.is_ready),
            get("/metrics", service.prometheus),
            get("/", static("page.html", "text/html; charset=utf-8")),
            get("/page.css", static("page.css", "text/css; charset=utf-8")),
            get("/page.js", static("page.js", "text/javascript; charset=utf-8")),
        ],
        lifespan=service.lifespan,
        exception_handlers={Refused: service.refused, HTTPException: _http_error},
    )
    made.add_middleware(partial(_Gate, metrics=service.metrics, token=token, hosts=hosts))  # type: ignore[arg-type]
    return made


class _Service:
    def __init__(self, model: Model, limits: Limits):
        self.model, self.limits, self.metrics = model, limits, Metrics()
        self.batcher: Batcher | None = None
        self.warm, self.failed = False, ""
        self._bytes = 0  # of bodies that are being read or wait

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.batcher = Batcher(self.model.predictor, self.limits, self.metrics)
        warming = asyncio.create_task(self._warm_up())
        try:
            yield
        finally:
            warming.cancel()
            await asyncio.get_running_loop().run_in_executor(None, self.batcher.close)

    async def _warm_up(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(None, self.model.warm_up)
            self.warm = True
            _log.info("ready to predict")
        except Exception as error:  # whatever compiling says: the probes tell it on
            _log.exception("warming up failed")
            self.failed = f"{type(error).__name__}: warming up failed, see the log"

    # -- small routes

    async def health(self, _: Request) -> Response:
        """Whether the process is worth keeping."""
        return _json({"status": self.failed or "ok"}, 503 if self.failed else 200)

    async def is_ready(self, _: Request) -> Response:
        """Whether requests should be sent here."""
        if self.warm:
            return _json({"status": "ready"})
        return _json({"status": self.failed or "warming up"}, 503, {"Retry-After": "5"})

    async def prometheus(self, _: Request) -> Response:
        waiting = 0 if self.batcher is None else self.batcher.rows
        text = self.metrics.text(waiting, self.warm)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8", headers=_SAFE)

    async def refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        self.metrics.refused(error.code)
        return _answer(error)

    # -- one prediction

    async def predict(self, request: Request) -> Response:
        arrived = time.monotonic()
        if not self.warm or self.batcher is None:
            raise Refused(503, "not_ready", self.failed or "the model is being compiled", retry_after=5)
        headers = request.headers
        seconds, anytime = self._deadline(headers.get("x-deadline-ms"))
        if headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "compressed", "compressed bodies are not taken")
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        held = [0]
        try:
            body = await self._body(request, held)
            read = partial(self.model.read, media, body, self.limits.rows)
            inputs, rows, notes = await _beside(read) if len(body) > _LARGE else read()
            work = self.batcher.predict(inputs, rows, arrived + seconds, anytime)
            prediction = await _unless_gone(work, request.receive)
        finally:
            self._bytes -= held[0]
        self.metrics.predicted(rows, float(prediction.epistemic.double().sum()))
        wanted = headers.get("accept", "")
        write = partial(self._write, prediction, notes, ARROW in wanted)
        return await _beside(write) if rows * prediction.total[0].numel() > 256 else write()

    def _write(self, prediction: Any, notes: dict[str, Any], as_arrow: bool) -> Response:
        if as_arrow:
            return Response(arrow.write(self.model.columns(prediction)), media_type=ARROW, headers=_SAFE)
        return _json(self.model.answer(prediction, notes))

    def _deadline(self, asked: str | None) -> tuple[float, bool]:
        """Seconds, and whether the client has set them."""
        if asked is None:
            return self.limits.deadline, False
        if not (asked.isascii() and asked.isdigit() and len(asked) <= 9 and int(asked) >= 1):
            raise Refused(422, "bad_deadline", "X-Deadline-Ms is a whole number of milliseconds, at least 1")
        return min(int(asked) / 1000, self.limits.deadline), True

    async def _body(self, request: Request, held: list[int]) -> bytes:
        """The body, counted while it comes: a length that is not stated, or wrong, changes nothing."""
        limits, chunks, size = self.limits, [], 0
        stated = request.headers.get("content-length", "0")
        if stated.isdigit() and int(stated) > limits.body_bytes:
            raise Refused(413, "too_large", f"a body has at most {limits.body_bytes} bytes")
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limits.body_bytes:
                        raise Refused(413, "too_large", f"a body has at most {limits.body_bytes} bytes")
                    if self._bytes + len(chunk) > limits.total_bytes:
                        raise Refused(503, "busy", "too many bodies are being read; try again in 1 s", retry_after=1)
                    held[0] += len(chunk)
                    self._bytes += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refused(408, "slow", f"the body took longer than {limits.body_seconds:g} s") from None
        return b"".join(chunks)


class _Gate:
    """Before every route: who asks, by which name, and how it ended."""

    def __init__(self, inner: ASGIApp, metrics: Metrics, token: str | None, hosts: Sequence[str] | None):
        self.inner, self.metrics = inner, metrics
        self.token = None if token is None else token.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        begun, status = time.monotonic(), 499  # as nginx has it: the client was gone before an answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._check(scope)
            if refused is None:
                await self.inner(scope, receive, noting)
            else:
                self.metrics.refused(refused.code)
                await _answer(refused)(scope, receive, noting)
        except ClientDisconnect:
            pass
        except Exception:
            # nothing of ours should come here; the client is told so, and no more
            _log.exception("a request failed")
            if status == 499:
                await _answer(Refused(500, "failed", "the service failed; see its log"))(scope, receive, noting)
        finally:
            route = scope["path"].removeprefix("/v1/").strip("/") or "page"
            known = route in ("predict", "model", "openapi.json", "health", "ready", "metrics", "page")
            self.metrics.request(route if known else "other", status, time.monotonic() - begun)

    def _check(self, scope: Scope) -> Refused | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self.hosts:
                return Refused(421, "wrong_host", "this service is not known by that name; see --allow-host")
        if self.token is not None and scope["path"] not in _OPEN:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.token):
                return Refused(401, "unauthorised", "send the token: Authorization: Bearer ...")
        return None


async def _beside(work: Callable[[], Any]) -> Any:
    """In a thread, so that a large request does not hold up small ones."""
    return await asyncio.get_running_loop().run_in_executor(None, work)


async def _unless_gone(work: Any, receive: Receive) -> Any:
    """The result, unless the client goes away first: then it is not computed."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(receive())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


_SAFE = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # numbers that are not finite become null
    return Response(msgspec.json.encode(value), status, {**_SAFE, **(headers or {})}, "application/json")


def _static(content: bytes, media: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=media, headers=_SAFE)


def _answer(error: Refused) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(math.ceil(error.retry_after))}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["Connection"] = "close"  # what is left of the body is not read
    return _json({"error": {"code": error.code, "message": error.message}}, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"error": {"code": "http", "message": error.detail}}
    return _json(body, error.status_code, dict(error.headers or {}))
