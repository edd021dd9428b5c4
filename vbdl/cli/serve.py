"""The command `vbdl serve`."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Serve:
    """Serve a model over HTTP: predictions, health, metrics, an OpenAPI description and a web page to try it.

    Listens on the loopback address unless --host is given. If the environment variable VBDL_TOKEN or a file holds a
    token, every client has to send it."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Folder of the artifact."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every network."""
    port: int = 8000
    """Port to listen on."""
    workers: int = 1
    """Number of worker processes, each with its own copy of the model."""
    threads: int = 1
    """Number of threads that torch uses in each worker; 0 leaves the choice to torch."""
    token_file: Path | None = None
    """File with the token that clients have to send."""
    allow_host: tuple[str, ...] = ()
    """Host names by which clients may address the service, besides localhost."""
    tls_certificate: Path | None = None
    """Certificate file (PEM) for HTTPS."""
    tls_key: Path | None = None
    """Key file (PEM) for HTTPS."""
    trust: tuple[str, ...] = ()
    """Packages that the network and registered classes may be imported from. Importing runs their code."""
    tiles: tuple[int, ...] = ()
    """Batch sizes to compile for; the artifact's unless given. 1 64 answers single rows sooner, but only
    equal to rounding."""
    device: str | None = None
    """Device to compute on, like cpu or cuda."""
    compile: bool = True
    """Compile the model at the start."""
    batch_rows: int = 256
    """Largest number of rows that are computed together."""
    batch_wait_ms: float = 0.0
    """Milliseconds that a request may wait for others. Requests that arrive during a batch form the next one anyway."""
    queue_rows: int = 8192
    """Largest number of waiting rows; further requests are refused with 503 and Retry-After."""
    max_rows: int = 4096
    """Largest number of rows in a request."""
    max_mib: float = 8.0
    """Largest size of a request's body, in MiB."""
    patience: float = 10.0
    """Seconds that a client may take for each step: handshake, headers, body, next request, reading an answer."""
    max_connections: int = 1000
    """Largest number of connections of a process; beyond that only probes are answered."""
    deadline: float = 30.0
    """Seconds until a request is answered with 504; clients may ask for less with X-Deadline-Ms."""

    def __call__(self) -> None:
        from vbdl.serve.limits import Limits
        from vbdl.serve.run import TOKEN, Server, run

        if self.token_file is not None:
            token = self.token_file.read_text().strip()
            if not token:
                raise ValueError(f"{self.token_file} is empty: it should hold the token")
            os.environ[TOKEN] = token
        limits = dataclasses.replace(
            Limits(),
            body_bytes=int(self.max_mib * 2**20),
            rows=self.max_rows,
            queue_rows=self.queue_rows,
            batch_rows=self.batch_rows,
            batch_wait=self.batch_wait_ms / 1000,
            deadline=self.deadline,
            body_seconds=self.patience,
            connections=self.max_connections,
        )
        settings = {"trust": list(self.trust), "compile": self.compile, "device": self.device, "tiles": self.tiles}
        run(
            Server(
                str(self.model),
                self.host,
                self.port,
                self.workers,
                self.threads,
                {name: value for name, value in settings.items() if value not in (None, (), [])},
                limits,
                self.allow_host,
                None if self.tls_certificate is None else str(self.tls_certificate),
                None if self.tls_key is None else str(self.tls_key),
            )
        )
