"""The service as a process, or several: uvicorn, with a limit on how slowly a client may speak."""

import asyncio
import dataclasses
import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from vbdl.serve.app import LOOPBACK, app
from vbdl.serve.limits import Limits
from vbdl.serve.model import Model

_WORKER = "VBDL_SERVE"  # what a worker process needs to know, as JSON; the token has a variable of its own
TOKEN = "VBDL_TOKEN"
DRAIN = 10  # seconds that requests get to finish once the process is told to stop
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Server:
    """Where and how a model is served."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 1  # of torch in each worker
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # of vbdl.load, as JSON has them
    limits: Limits = Limits()
    hosts: tuple[str, ...] = ()  # names besides those of the loopback
    tls_certificate: str | None = None
    tls_key: str | None = None

    @property
    def loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


def run(server: Server) -> None:
    """Serve until told to stop. ValueError or OSError for what a user can repair, before anything listens."""
    if server.workers < 1 or not 0 <= server.port <= 65535 or server.threads < 0:
        raise ValueError(f"workers are at least 1, a port lies in 0..65535: {server.workers} and {server.port}")
    if (server.tls_certificate is None) != (server.tls_key is None):
        raise ValueError("TLS needs both a certificate and its key")
    for file in (server.tls_certificate, server.tls_key):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"{file} is not there")
    if not server.loopback and not os.environ.get(TOKEN):
        _log.warning("listening on %s without a token: whoever reaches it can use the model", server.host)
    if not server.loopback and server.tls_certificate is None:
        _log.warning("listening on %s without TLS: what is sent can be read on the way", server.host)
    options: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "http": functools.partial(_Patient, limits=server.limits),
        "timeout_graceful_shutdown": DRAIN,
        "timeout_keep_alive": 30,
        "backlog": 1024,
        "ssl_certfile": server.tls_certificate,
        "ssl_keyfile": server.tls_key,
        "server_header": False,
        "access_log": False,  # neither bodies nor tokens nor addresses
        "log_config": None,
        "lifespan": "on",
    }
    if server.workers == 1:
        try:
            uvicorn.run(_made(server), **options)
        except SystemExit as error:  # with 3, which means something else here
            raise OSError(f"nothing is served on {server.host}:{server.port}, for the reason above") from error
        return
    from vbdl.artefact.manifest import read

    read(server.model)  # what is wrong with the artefact is said once, here
    os.environ[_WORKER] = json.dumps(dataclasses.asdict(server))
    options["http"] = "vbdl.serve.run:worker_protocol"
    uvicorn.run("vbdl.serve.run:worker", factory=True, workers=server.workers, **options)


def worker() -> Starlette:
    """The application of one of several worker processes."""
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    return _made(_told())


def _told() -> Server:
    found = json.loads(os.environ[_WORKER])
    return Server(**{**found, "limits": Limits(**found["limits"]), "hosts": tuple(found["hosts"])})


def _made(server: Server) -> Starlette:
    import torch

    if server.threads:
        torch.set_num_threads(server.threads)
    model = Model(server.model, **server.settings)
    hosts = (*LOOPBACK, *server.hosts) if server.loopback or server.hosts else None
    _log.info("serving %s on %s:%d", model.name, server.host, server.port)
    return app(model, server.limits, token=os.environ.get(TOKEN) or None, hosts=hosts)


class _Patient(HttpToolsProtocol):
    """uvicorn's protocol, but a client that does not finish its headers in time, or sends too many, is cut off."""

    def __init__(self, *arguments: Any, limits: Limits, **options: Any):
        super().__init__(*arguments, **options)
        self._limits, self._timer, self._seen = limits, None, 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._timer is not None:
            self._seen += len(data)
            # a part of a body may have come with the headers: one read is forgiven
            if self._seen > self._limits.header_bytes + 2**18:
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._timer is None:
            self._wait()

    def on_headers_complete(self) -> None:
        self._stop()
        super().on_headers_complete()

    def _wait(self) -> None:
        self._seen = 0
        self._timer = asyncio.get_running_loop().call_later(self._limits.body_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def worker_protocol(*arguments: Any, **options: Any) -> _Patient:
    """The protocol of a worker process, which knows its limits from the environment."""
    return _Patient(*arguments, limits=_told().limits, **options)
