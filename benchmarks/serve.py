"""Measure the latency that the service adds to a prediction, with one client and with eight.

    python benchmarks/serve.py [--seconds 10]

`vbdl serve` serves a compiled ensemble of 5 networks 32-64-64-3 in its own process on the loopback. Clients are raw
keep-alive sockets in this process, to exclude the overhead of a client library. In-process calls use the same artifact
and take turns with calls over HTTP. Answers are compared before timing. It needs two cores.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import vbdl
from vbdl.posteriors.ensemble import DeepEnsemble

FEATURES = 32


class Client:
    """A keep-alive connection that sends a request at once and reads an answer by its Content-Length."""

    def __init__(self, port: int):
        self.connection = socket.create_connection(("127.0.0.1", port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.left = b""

    def ask(self, request: bytes) -> tuple[int, bytes]:
        self.connection.sendall(request)
        data = self.left
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        while len(body) < length:
            body += self._more()
        self.left = body[length:]
        return int(head.split()[1]), body[:length]

    def _more(self) -> bytes:
        received = self.connection.recv(2**18)
        if not received:
            raise ConnectionError("the service closed the connection")
        return received


def request(rows: np.ndarray) -> bytes:
    body = json.dumps({"inputs": rows.tolist()}).encode()
    lines = ("POST /v1/predict HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join((*lines, f"Content-Length: {len(body)}", "", "")).encode() + body


@contextlib.contextmanager
def served(folder: Path, *options: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vbdl.cli", "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1200):
            with contextlib.suppress(OSError):
                if Client(port).ask(b"GET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")[0] == 200:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return {"p50_ms": float(p50), "p99_ms": float(p99), "n": len(seconds)}


def alone(predictor, port: int, rows: int, seconds: float) -> dict:
    """Time calls in process and over HTTP in turns, with one client."""
    x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(rows))
    client, sent = Client(port), request(x.numpy())
    status, body = client.ask(sent)
    served = torch.tensor([row["probs"] for row in json.loads(body)["predictions"]])
    assert status == 200 and torch.equal(served, predictor(x).probs), "the service answers other numbers"
    inside: list[float] = []
    over: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        predictor(x)
        inside.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        client.ask(sent)
        over.append(time.perf_counter() - begun)
    added = float(np.median(over) - np.median(inside)) * 1000
    return {
        "rows": rows,
        "clients": 1,
        "in_process": percentiles(inside),
        "http": percentiles(over),
        "added_p50_ms": added,
    }


def together(port: int, clients: int, seconds: float) -> dict:
    """Time clients that request one row after the other, all at once."""
    sent = request(np.random.default_rng(0).standard_normal((1, FEATURES)).astype(np.float32))
    times: list[list[float]] = [[] for _ in range(clients)]
    end = time.perf_counter() + seconds

    def run(mine: list[float]) -> None:
        client = Client(port)
        while (begun := time.perf_counter()) < end:
            status, _ = client.ask(sent)
            assert status == 200
            mine.append(time.perf_counter() - begun)

    threads = [threading.Thread(target=run, args=(mine,)) for mine in times]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    every = [t for mine in times for t in mine]
    return {"rows": 1, "clients": clients, "http": percentiles(every), "requests_a_second": len(every) / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    predictor = vbdl.Predictor(DeepEnsemble([make() for _ in range(5)]), vbdl.Categorical())
    results = []
    with tempfile.TemporaryDirectory() as folder:
        path = predictor.save(Path(folder) / "model", example=torch.zeros(1, FEATURES))
        predictor = vbdl.load(path)
        predictor.warm_up(example=torch.zeros(1, FEATURES))
        with served(path) as port:
            results += [alone(predictor, port, rows, seconds) for rows in (1, 64)]
            results += [together(port, clients, seconds) for clients in (1, 8)]
    print(
        f"{'rows':>5s} {'clients':>8s} {'in process p50':>15s} {'http p50':>9s} {'http p99':>9s} "
        f"{'added p50':>10s} {'req/s':>7s}"
    )
    for r in results:
        inside = f"{r['in_process']['p50_ms']:.3f} ms" if "in_process" in r else ""
        added = f"{r['added_p50_ms']:.3f} ms" if "added_p50_ms" in r else ""
        rate = f"{r['requests_a_second']:.0f}" if "requests_a_second" in r else ""
        http = r["http"]
        print(
            f"{r['rows']:5d} {r['clients']:8d} {inside:>15s} {http['p50_ms']:6.3f} ms {http['p99_ms']:6.3f} ms "
            f"{added:>10s} {rate:>7s}"
        )
    for r in results:
        print(json.dumps(r))


if __name__ == "__main__":
    main()
