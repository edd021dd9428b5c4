"""The same artifact on Ray Serve answers the same numbers."""

import contextlib
import random
import socket
import time

import httpx
import pytest
import torch

import vbdl


def free_port():
    """Of those that neither the system (32768 and up) nor Ray (10002 to 19999) gives to connections of its own."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_replica_answers_as_the_predictor(arrays_model, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # a busy machine is no dead one
    ray = pytest.importorskip("ray")
    from ray import serve

    from vbdl.serve import Limits
    from vbdl.serve.ray import deployment

    port = free_port()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        made = deployment(arrays_model, limits=Limits(rows=50, queue_rows=500), token="t0ken", num_replicas=1)
        serve.run(made, route_prefix="/")
        address = f"http://127.0.0.1:{port}"
        headers = {"Authorization": "Bearer t0ken"}
        x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
        for _ in range(200):
            if httpx.get(f"{address}/ready").status_code == 200:
                break
            time.sleep(0.1)
        found = httpx.post(f"{address}/v1/predict", json={"inputs": x.tolist()}, headers=headers)
        probs = torch.tensor([row["probs"] for row in found.json()["predictions"]])
        assert torch.equal(probs, vbdl.load(arrays_model)(x).probs)
        assert httpx.post(f"{address}/v1/predict", json={"inputs": x.tolist()}).status_code == 401
        many = {"inputs": x.repeat(3, 1).tolist()}
        assert httpx.post(f"{address}/v1/predict", json=many, headers=headers).status_code == 413
    finally:
        serve.shutdown()
        ray.shutdown()
