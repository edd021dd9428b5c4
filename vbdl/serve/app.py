"""The ASGI application: the routes, and a middleware that checks every request before them."""

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.resources import files

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vbdl.serve.limits import Gone, Limits, Refused
from vbdl.serve.model import Model
from vbdl.serve.openapi import document
from vbdl.serve.serving import ARROW as ARROW
from vbdl.serve.serving import SAFE, Serving, answer

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_OPEN = ("/", "/page.css", "/page.js", "/health", "/ready")  # need no token: they say nothing about the model
_SINGLE = (b"host", b"authorization", b"content-type", b"content-length", b"content-encoding", b"x-deadline-ms")
# names of routes in the metrics; all others are counted as "other"
_ROUTES = ("predict", "model", "openapi.json", "health", "ready", "metrics", "page")
_log = logging.getLogger(__name__)


def app(
    model: Model, limits: Limits | None = None, *, token: str | None = None, hosts: Sequence[str] | None = None
) -> Starlette:
    """Return the service of a model as an application for any ASGI server.

    token: required as `Authorization: Bearer ...` by every route except the page and the probes.
    hosts: names allowed in the Host header, without a port; None allows any. LOOPBACK protects a service on the same
        machine from web pages that reach it by a host name of their own (DNS rebinding).
    """
    serving = Serving(model, limits or Limits())
    get = lambda path, endpoint: Route(path, endpoint, methods=["GET"])
    page = files("vbdl.serve") / "page"
    static = lambda name, media: _static((page / name).read_bytes(), media)
    described = _json(document(model, serving.limits, token is not None))

    async def health(_: Request) -> Response:
        """Answer 200 as long as the process should be kept, 503 after warming up has failed."""
        return _json({"status": serving.failed or "ok"}, 503 if serving.failed else 200)

    async def ready(_: Request) -> Response:
        """Answer 200 once requests can be predicted, 503 before."""
        if serving.warm:
            return _json({"status": "ready"})
        return _json({"status": serving.failed or "warming up"}, 503, {"Retry-After": "5"})

    async def metrics(_: Request) -> Response:
        waiting = 0 if serving.batcher is None else serving.batcher.rows
        text = serving.metrics.text(waiting, serving.warm)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8", headers=SAFE)

    application = Starlette(
        routes=[
            Route("/v1/predict", serving, methods=["POST"]),
            get("/v1/model", lambda _: _json(model.about())),
            get("/openapi.json", lambda _: described),
            get("/health", health),
            get("/ready", ready),
            get("/metrics", metrics),
            get("/", static("page.html", "text/html; charset=utf-8")),
            get("/page.css", static("page.css", "text/css; charset=utf-8")),
            get("/page.js", static("page.js", "text/javascript; charset=utf-8")),
        ],
        lifespan=serving.lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    application.add_middleware(partial(_Gate, serving=serving, token=token, hosts=hosts))  # type: ignore[arg-type]
    return application


class _Gate:
    """Middleware before every route: it checks repeated headers, host and token, and counts answers in the metrics."""

    def __init__(self, inner: ASGIApp, serving: Serving, token: str | None, hosts: Sequence[str] | None):
        self.inner, self.serving, self.metrics = inner, serving, serving.metrics
        self.token = None if token is None else token.encode()
        self.hosts = None if hosts is None else frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.inner(scope, receive, send)
            return
        begun, status = time.monotonic(), 499  # the code of nginx for a client that left before the answer

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._check(scope)
            if refused is not None:
                self.metrics.refused(refused.code)
                await answer(refused, noting)
            elif scope["path"] == "/v1/predict" and scope["method"] == "POST":
                await self.serving(scope, receive, noting)  # directly, because routing takes time
            else:
                await self.inner(scope, receive, noting)
        except (ClientDisconnect, Gone):
            pass
        except Exception:
            # a bug: the log has the traceback, the client gets no details
            _log.exception("a request failed")
            if status == 499:
                await answer(Refused(500, "failed", "the service failed; see its log"), noting)
        finally:
            route = scope["path"].removeprefix("/v1/").strip("/") or "page"
            self.metrics.request(route if route in _ROUTES else "other", status, time.monotonic() - begun)

    def _check(self, scope: Scope) -> Refused | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if len(headers) < len(scope["headers"]):
            # a proxy in front of the service may have read the other of two equal headers
            names = [name for name, _ in scope["headers"]]
            for name in _SINGLE:
                if names.count(name) > 1:
                    return Refused(400, "header_twice", f"the header {name.decode()} is given twice")
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in self.hosts:
                return Refused(421, "wrong_host", "this service is not known by that name; see --allow-host")
        if self.token is not None and scope["path"] not in _OPEN:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self.token):
                return Refused(401, "unauthorised", "send the token: Authorization: Bearer ...")
        return None


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    # numbers that are not finite become null
    return Response(msgspec.json.encode(value), status, {**SAFE, **(headers or {})}, "application/json")


def _static(content: bytes, media: str) -> Callable[[Request], Response]:
    return lambda _: Response(content, media_type=media, headers=SAFE)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = {"error": {"code": "http", "message": error.detail}}
    return _json(body, error.status_code, dict(error.headers or {}))
