"""Runs the service in one or several processes of uvicorn, with vbdl's server and protocol."""

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from uvicorn.supervisors import multiprocess

from vbdl.artifact.trust import look_here
from vbdl.serve import listening
from vbdl.serve.app import LOOPBACK, app
from vbdl.serve.limits import Limits
from vbdl.serve.model import Model
from vbdl.types import Keywords

_WORKER = "VBDL_SERVE"  # environment variable with the options of a worker as JSON; the token has another variable
TOKEN = "VBDL_TOKEN"
DRAIN = 10  # seconds for running requests to finish after the process is told to stop
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Server:
    """The options of a server: the model, its address, its processes, its limits."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 1  # number of threads of torch in each worker
    settings: Keywords = dataclasses.field(default_factory=dict)  # arguments of vbdl.load, as JSON holds them
    limits: Limits = Limits()
    hosts: tuple[str, ...] = ()  # host names besides those of the loopback address
    tls_certificate: str | None = None
    tls_key: str | None = None

    @property
    def loopback(self) -> bool:
        return self.host in ("127.0.0.1", "localhost", "::1")


def run(server: Server) -> None:
    """Serve until the process is stopped. Raises ValueError or OSError, before anything listens, for wrong options."""
    if server.workers < 1 or not 0 <= server.port <= 65535 or server.threads < 0:
        raise ValueError(f"workers are at least 1, a port lies in 0..65535: {server.workers} and {server.port}")
    if (server.tls_certificate is None) != (server.tls_key is None):
        raise ValueError("TLS needs both a certificate and its key")
    for file in (server.tls_certificate, server.tls_key):
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"there is no file {file}: give the path of the certificate or key")
    if not server.loopback and not os.environ.get(TOKEN):
        _log.warning("listening on %s without a token: whoever reaches it can use the model", server.host)
    if not server.loopback and server.tls_certificate is None:
        _log.warning("listening on %s without TLS: what is sent can be read on the way", server.host)
    options: Keywords = {
        "host": server.host,
        "port": server.port,
        "timeout_graceful_shutdown": DRAIN,
        "ws": "none",  # WebSockets would have a protocol without these limits
        "backlog": 1024,
        "ssl_certfile": server.tls_certificate,
        "ssl_keyfile": server.tls_key,
        "server_header": False,
        "access_log": False,  # no access log: it would hold addresses
        "log_config": None,
        "lifespan": "on",
    }
    if server.workers == 1:
        one = listening.Server(uvicorn.Config(_application(server), **options), server.limits)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                one.run()
        except SystemExit as error:  # uvicorn exits with 3, which has another meaning in vbdl
            raise OSError(f"nothing is served on {server.host}:{server.port}, for the reason above") from error
        return
    from vbdl.artifact.manifest import read

    read(server.model)  # read the manifest once before the workers do, so that an error in it is reported once
    os.environ[_WORKER] = json.dumps(dataclasses.asdict(server))
    multiprocess.Process = listening.Worker  # uvicorn creates worker processes by this name  # type: ignore[misc]
    options["timeout_worker_healthcheck"] = listening.READY
    uvicorn.run("vbdl.serve.run:worker", factory=True, workers=server.workers, **options)


def worker() -> Starlette:
    """Create the application in one of several worker processes."""
    logging.basicConfig(level=logging.INFO, format="%(process)d %(message)s")
    return _application(server_of_parent())


def server_of_parent() -> Server:
    """The options that the parent passed to this worker process."""
    options = json.loads(os.environ[_WORKER])
    return Server(**{**options, "limits": Limits(**options["limits"]), "hosts": tuple(options["hosts"])})


def _application(server: Server) -> Starlette:
    """Load the model of this process, and return its application."""
    import torch

    if server.threads:
        torch.set_num_threads(server.threads)
    look_here(server.settings.get("trust", ()))
    model = Model(server.model, **server.settings)
    hosts = (*LOOPBACK, *server.hosts) if server.loopback or server.hosts else None
    _log.info("serving %s on %s:%d", model.name, server.host, server.port)
    return app(model, server.limits, token=os.environ.get(TOKEN) or None, hosts=hosts)
