"""Deployment of the same service with Ray Serve on several machines. Needs `vbdl[ray]`.

    serve.run(vbdl.serve.ray.deployment("model", num_replicas=4), route_prefix="/")

A replica answers a single row some ten milliseconds later than `vbdl serve`, because a proxy and an actor lie in
between: use Ray for more load than one machine takes, and `vbdl serve` for low latency.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette

from vbdl.artifact.loading import LoadOptions
from vbdl.serve.app import app
from vbdl.serve.limits import Limits
from vbdl.serve.model import Model

if TYPE_CHECKING:
    from ray.serve import Application


def deployment(
    folder: str | Path,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    threads: int = 1,
    settings: LoadOptions | None = None,
    **options: Any,
) -> "Application":
    """Return a bound deployment of the artifact, for `serve.run`.

    folder: the artifact's folder, which must exist on every machine with a replica. threads: number of threads of torch
    in a replica; 0 leaves the choice to torch. settings: arguments of vbdl.load. options: arguments of
    serve.deployment (num_replicas, autoscaling_config, ray_actor_options, ...).
    """
    from ray import serve

    path, loading = str(Path(folder).resolve()), settings or {}

    def build() -> Starlette:
        """Build the application in the replica; Ray Serve starts and ends its lifespan."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        return app(Model(path, **loading), limits, token=token)

    options = {"name": "vbdl", "max_ongoing_requests": 256, "max_queued_requests": 1024, **options}
    return serve.deployment(**options)(serve.ingress(build)()).bind()
