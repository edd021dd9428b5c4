"""Deployment of the same service with Ray Serve on several machines. Needs `vbdl[ray]`.

    serve.run(vbdl.serve.ray.deployment("model", num_replicas=4), route_prefix="/")

One replica answers a single row some ten milliseconds later than `vbdl serve`, which is what a proxy and an actor in
between cost: it is for scale-out, and `vbdl serve` for latency.
"""

from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from vbdl.serve.app import app
from vbdl.serve.limits import Limits
from vbdl.serve.model import Model


def deployment(
    folder: str | Path,
    *,
    limits: Limits | None = None,
    token: str | None = None,
    threads: int = 1,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A bound deployment of the artifact, for `serve.run`.

    folder: on every machine that may hold a replica. threads: of torch in a replica; 0 leaves the choice to torch.
    settings: of vbdl.load. options: of serve.deployment (num_replicas, autoscaling_config, ray_actor_options, ...).
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
