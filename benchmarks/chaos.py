"""Test the service and batch jobs under load, hostile bodies, slow clients, kills and reloads.

    python benchmarks/chaos.py [--seconds 40] [--only load hostile slow kill tests]

Prints one JSON line per result, and then the table of docs/reliability.md. `--only load --seconds 1800` is the soak
test. Answers are compared byte for byte with those of the service without load, which are compared with the
predictor's. Clients are raw sockets in this process, so that two cores suffice for both sides. `tests` runs the test
suite's files on damaged or interrupted jobs and artifacts, and counts them.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from serve import Client
from torch import nn

import vbdl

FEATURES, MIB = 32, 2**20
ROOT = Path(__file__).resolve().parent.parent
# test files on jobs and artifacts, which are run if they exist
TESTS = {
    "bodies of a seed, three parsers": ["tests/serve/test_fuzz.py"],
    "a client slow in every phase": ["tests/serve/test_connections.py"],
    "batch jobs killed at every step": ["tests/batch/test_every_kill.py", "tests/batch/test_resuming.py"],
    "journals and manifests changed by others": ["tests/batch/test_records.py", "tests/batch/test_changed_inputs.py"],
    "damaged tables and arrays": ["tests/batch/test_damaged_inputs.py", "tests/tabular/test_damaged_files.py"],
    "artifacts mutated": ["tests/artifact/test_arguments.py", "tests/artifact/test_hostile.py"],
}


# -- a service and its clients


class Service:
    """A `vbdl serve` process, its port and its output."""

    def __init__(self, process: subprocess.Popen, port: int, log: list[str]):
        self.process, self.port, self.log = process, port, log

    def ready(self) -> int:
        """The number of times that a worker became ready."""
        return sum("ready to predict" in line for line in self.log)

    def workers(self) -> list[int]:
        mine = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in mine if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def memory(self) -> float:
        """The resident memory of the service's largest process, MiB."""
        pages = [0]
        for pid in (self.process.pid, *self.workers()):
            with contextlib.suppress(OSError):
                pages.append(int(Path(f"/proc/{pid}/statm").read_text().split()[1]))
        return max(pages) * resource.getpagesize() / MIB


@contextlib.contextmanager
def served(folder: Path, *options: str, files: int | None = None) -> Iterator[Service]:
    """files: the limit of open files of the service."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vbdl.cli", "serve", str(folder), "--port", str(port), "--no-compile", *options]
    if files is not None:
        command = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *command]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    log: list[str] = []
    stream = process.stderr
    assert stream is not None
    threading.Thread(target=lambda: log.extend(iter(stream.readline, "")), daemon=True).start()
    service = Service(process, port, log)
    try:
        wanted = int(options[options.index("--workers") + 1]) if "--workers" in options else 1
        until(lambda: service.ready() >= wanted, lambda: process.poll() is None)
        time.sleep(0.5)
        yield service
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def until(true: Callable[[], bool], alive: Callable[[], bool] = lambda: True, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end or not alive():
            raise TimeoutError("the service did not reach the expected state in time: read its output")
        time.sleep(0.05)


def request(body: bytes, path: str = "/v1/predict", method: str = "POST", **headers: object) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in {"Content_Length": len(body), **headers}.items()]
    return "\r\n".join((*lines, "", "")).encode() + body


class Good:
    """Clients that request rows one after the other, with a pause, and compare the answers."""

    def __init__(self, port: int, asked: list[tuple[bytes, bytes]], clients: int, pause: float = 0.02):
        self.port, self.asked, self.pause = port, asked, pause
        self.statuses: Counter[int] = Counter()
        self.times: list[tuple[float, float]] = []  # (time of the request, seconds to the answer)
        self.lost = self.wrong = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(k,)) for k in range(clients)]

    def __enter__(self) -> "Good":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        turns = itertools.cycle(range(number, len(self.asked), max(1, len(self._threads) // 2)))
        client = None
        while not self._stop.wait(self.pause):
            sent, expected = self.asked[next(turns)]
            begun = time.monotonic()
            try:
                client = client or Client(self.port)
                status, body = client.ask(sent)
            except OSError:
                self.lost += 1
                client = None
                continue
            self.times.append((begun, time.monotonic() - begun))
            self.statuses[status] += 1
            client = client if status == 200 else None
            self.wrong += status == 200 and body != expected

    def p99(self, apart: list[tuple[float, float]] = ()) -> float:  # type: ignore[assignment]
        """The 99th percentile of the latency in milliseconds, without requests in these spans of time."""
        kept = [took for begun, took in self.times if not any(a <= begun <= b for a, b in apart)]
        return float(np.percentile(kept, 99)) * 1000 if kept else float("nan")

    def counts(self) -> dict:
        # the service documents 503; any other missing answer is a failure
        return {
            "answered": self.statuses[200],
            "refused_503": self.statuses[503],
            "other": sum(self.statuses.values()) - self.statuses[200] - self.statuses[503],
            "lost": self.lost,
            "wrong": self.wrong,
        }


def hostile_small(random: random.Random) -> bytes:
    """Malformed requests by name."""
    good = bytearray(json.dumps({"inputs": [[0.5] * FEATURES]}).encode())
    kind = random.randrange(7)
    if kind == 0:
        for _ in range(random.randint(1, 6)):
            good[random.randrange(len(good))] = random.randrange(256)
        return request(bytes(good), Connection="close")
    if kind == 1:
        return request(bytes(good), Connection="close")[: random.randrange(1, 200)]
    if kind == 2:
        return random.randbytes(random.randint(1, 400))
    if kind == 3:
        return request(b'{"inputs": ' + b"[" * random.choice([10, 1000, 60_000]), Connection="close")
    if kind == 4:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({random.randint(-9, 2**62)}, 4), }}".encode()
        body = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
        return request(body, Connection="close").replace(b"application/json", b"application/x-npy")
    if kind == 5:
        return request(b'{"inputs": [[1]], "inputs": [[2]]}', Connection="close", X_Deadline_Ms=random.choice("-x0"))
    return request(b"{}", random.choice(["/", "/%00", "/../x", "/v1/model"]), "BREW", Connection="close")


def filled(pattern: bytes) -> bytes:
    """A body of 8 MiB that repeats this text."""
    return b'{"inputs":[' + b",".join([pattern] * ((8 * MIB - 20) // (len(pattern) + 1))) + b"]}"


LARGE = {
    "[]": filled(b"[]"),
    "1": filled(b"1"),
    "{}": filled(b"{}"),
    "good rows": json.dumps({"inputs": [[0.1234567891234567] * FEATURES] * 4096})
    .replace(", ", "," + " " * 40)
    .encode(),
    "a million keys": b'{"inputs":{' + b",".join(b'"%d":1' % k for k in range(700_000)) + b"}}",
}
SLOW = [
    (b"", b""),
    (b"", b"\r\n"),
    (b"GET / HTTP/1.1\r\nHost: ", b"a"),
    *[
        (request(b"x", path, method, Content_Length=1000).replace(b"Content-Length: 1\r\n", b""), b"x")
        for path, method in (("/v1/predict", "POST"), ("/", "GET"), ("/health", "HEAD"), ("/none", "PUT"))
    ],
]


def send(port: int, data: bytes, whole: bool = False) -> int | None:
    """The status of the answer, or None if there is none. whole: whether the request is complete."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            if not whole:
                connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(4096)
        return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None
    return None


# -- the parts


def load(folder: Path, asked: list, seconds: float) -> Iterator[dict]:
    """Measure the service under good, bad, slow and impatient clients and reloads, all at once."""
    with served(folder, "--workers", "2", "--patience", "2") as service:

        def alone() -> float:
            with Good(service.port, asked, 4) as good:
                time.sleep(max(5.0, min(30.0, seconds / 6)))
            assert good.wrong == 0 and set(good.statuses) == {200}, good.counts()
            return good.p99()

        before, stop = alone(), threading.Event()
        bad: Counter[int | None] = Counter()
        impatient: Counter[int] = Counter()
        apart: list[tuple[float, float]] = []
        cut = [0]

        def attack() -> None:
            generator = random.Random(0)
            for turn in itertools.count():
                if stop.wait(0.1):
                    return
                # sometimes a large request
                large = turn % 100 == 99
                bad[send(service.port, request(LARGE["[]"]) if large else hostile_small(generator))] += 1

        def dawdle() -> None:
            held: list[socket.socket] = []
            for turn in itertools.count():
                if stop.wait(0.1):
                    break
                first, then = SLOW[turn % len(SLOW)]
                with contextlib.suppress(OSError):
                    held.append(socket.create_connection(("127.0.0.1", service.port), timeout=5))
                    held[-1].sendall(first)
                for one in list(held):
                    try:
                        one.setblocking(False)
                        one.send(then)
                    except BlockingIOError:
                        pass
                    except OSError:
                        held.remove(one)
                        one.close()
                        cut[0] += 1
            for one in held:
                one.close()

        def hurry() -> None:
            client = None
            while not stop.wait(0.25):
                with contextlib.suppress(OSError):
                    client = client or Client(service.port)
                    head, _, body = asked[0][0].partition(b"\r\n\r\n")
                    status, answer = client.ask(head + b"\r\nX-Deadline-Ms: 500\r\n\r\n" + body)
                    impatient[status] += 1
                    if status == 200 and json.loads(answer)["n_samples"] == 64:
                        probs = lambda body: [row["probs"] for row in json.loads(body)["predictions"]]
                        np.testing.assert_allclose(probs(answer), probs(asked[0][1]), atol=1e-6)
                    continue
                client = None

        threads = [threading.Thread(target=work) for work in (attack, dawdle, hurry)]
        for thread in threads:
            thread.start()
        memory, reloads = [], 0
        with Good(service.port, asked, 4) as good:
            begun = time.monotonic()
            while (left := begun + seconds - time.monotonic()) > 0:
                if seconds - left > (reloads + 0.4) * max(25.0, seconds / 3):
                    at, ready = time.monotonic(), service.ready()
                    service.process.send_signal(signal.SIGHUP)
                    until(lambda ready=ready: service.ready() >= ready + 2)
                    time.sleep(1)
                    apart.append((at - 0.5, time.monotonic()))
                    reloads, memory = reloads + 1, []
                memory.append(service.memory())
                time.sleep(min(1.0, max(0.0, left)))
        stop.set()
        for thread in threads:
            thread.join(60)
        after = alone()
        # buffers grow in the first third after a reload
        settled = memory[len(memory) // 3 :]
        yield {
            "what": "mixed load",
            "seconds": seconds,
            **good.counts(),
            "bad": sum(bad.values()),
            "bad_5xx": sum(n for status, n in bad.items() if (status or 0) >= 500 and status != 503),
            "slow_cut": cut[0],
            "impatient": dict(impatient),
            "reloads": reloads,
            "p99_alone_ms": max(before, after),
            "p99_ms": good.p99(apart),
            "p99_with_reloads_ms": good.p99(),
            "memory_growth_mib": settled[-1] - settled[0] if settled else 0.0,
            "tracebacks": sum("Traceback" in line for line in service.log),
        }


def hostile(folder: Path, asked: list, seconds: float) -> Iterator[dict]:
    """Send hostile bodies of 8 MiB, one and eight at once, while other clients request rows."""
    with served(folder) as service:
        send(service.port, request(LARGE["good rows"], Connection="close"), whole=True)
        for (name, body), at_once in itertools.product(LARGE.items(), (1, 8)):
            sent, statuses, most = request(body, Connection="close"), Counter(), [service.memory()]
            first = most[0]
            with Good(service.port, asked, 1, 0.002) as good:
                time.sleep(0.3)
                ask = lambda sent=sent, statuses=statuses: statuses.update([send(service.port, sent, whole=True)])
                threads = [threading.Thread(target=ask) for _ in range(at_once)]
                begun = time.monotonic()
                for thread in threads:
                    thread.start()
                while any(thread.is_alive() for thread in threads):
                    most.append(service.memory())
                    time.sleep(0.005)
                took = time.monotonic() - begun
            worst = max((took for at, took in good.times if at > begun - 0.1), default=0.0)
            yield {
                "what": f"8 MiB of {name}",
                "at_once": at_once,
                "statuses": {str(k): n for k, n in statuses.items()},
                "seconds": took,
                "others_waited_ms": worst * 1000,
                "memory_mib": max(most) - first,
                **good.counts(),
            }


def slow(folder: Path, asked: list, seconds: float) -> Iterator[dict]:
    """Run 200 clients that send slowly, in every phase and on any route, with a limit of 100 open files."""
    for files, patience in ((None, 3), (100, 3)):
        with served(folder, "--patience", str(patience), files=files) as service, contextlib.ExitStack() as stack:
            held = []
            for k in range(200):
                first, then = SLOW[k % len(SLOW)]
                with contextlib.suppress(OSError):
                    one = stack.enter_context(socket.create_connection(("127.0.0.1", service.port), timeout=5))
                    one.sendall(first)
                    one.setblocking(False)
                    held.append((one, then))
            begun, opened, probed = time.monotonic(), len(held), Counter()
            with Good(service.port, asked, 1) as good:
                while held and time.monotonic() - begun < 20:
                    for one, then in list(held):
                        try:
                            one.send(then or b"")
                            if not one.recv(4096):
                                raise ConnectionError
                        except BlockingIOError:
                            pass
                        except OSError:
                            held.remove((one, then))
                    probed[send(service.port, request(b"", "/health", "GET", Connection="close"), whole=True)] += 1
                    time.sleep(0.2)
                took = time.monotonic() - begun
                time.sleep(1)
            yield {
                "what": "slow clients" + (f", {files} open files" if files else ""),
                "opened": opened,
                "alive": len(held),
                "seconds": took,
                "patience": patience,
                "probes": {str(k): n for k, n in probed.items()},
                **good.counts(),
                "said": sum("others are refused" in line for line in service.log),
            }


def kill(folder: Path, asked: list, seconds: float) -> Iterator[dict]:
    """Kill workers with SIGKILL under load, again and again."""
    with served(folder, "--workers", "2") as service:
        kills = 3
        with Good(service.port, asked, 6, 0.005) as good:
            for _ in range(kills):
                time.sleep(1)
                ready = service.ready()
                os.kill(service.workers()[0], signal.SIGKILL)
                until(lambda ready=ready: service.ready() > ready)
            time.sleep(1)
        yield {"what": "worker killed", "kills": kills, "clients": 6, **good.counts()}


def tests(folder: Path, asked: list, seconds: float) -> Iterator[dict]:
    """Run test files on interrupted jobs and artifacts, and count their tests."""
    for what, files in TESTS.items():
        there = [file for file in files if (ROOT / file).exists()]
        if there:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", *there]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            completed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", completed.stdout)}
            yield {"what": what, "files": there, **counts}


PARTS = {"load": load, "hostile": hostile, "slow": slow, "kill": kill, "tests": tests}


def row(result: dict) -> str:
    """One line of the printed table."""
    skipped = ("what", "lost", "wrong", "other", "answered")
    figures = {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in result.items() if k not in skipped}
    text = "; ".join(f"{name.replace('_', ' ')} {figure}" for name, figure in figures.items())
    lost = f"{result['lost']} lost, {result['wrong']} wrong, {result['other']} other" if "lost" in result else ""
    return f"| {result['what']} | {text.replace('|', '/')} | {result.get('answered', '')} | {lost} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of mixed load")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(FEATURES, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 3))
    predictor = vbdl.Predictor(vbdl.MCDropout(net), vbdl.Categorical(), n_samples=64, compile=False)
    results = []
    with tempfile.TemporaryDirectory() as place:
        folder = predictor.save(Path(place) / "model", example=torch.zeros(1, FEATURES))
        x = torch.randn(64, FEATURES, generator=torch.Generator().manual_seed(1))
        bodies = [request(json.dumps({"inputs": x[k : k + 2].tolist()}).encode()) for k in range(0, 64, 2)]
        with served(folder) as service:
            client = Client(service.port)
            asked = [(body, client.ask(body)[1]) for body in bodies]
        probs = vbdl.load(folder, batch_invariant=True)(x).probs
        answered = [row["probs"] for _, answer in asked for row in json.loads(answer)["predictions"]]
        assert torch.equal(torch.tensor(answered), probs), "the service answers other numbers"
        for part in options.only:
            for result in PARTS[part](folder, asked, options.seconds):
                results.append(result)
                print(json.dumps(result), flush=True)
    print("\n| attack | measurements | answered | lost or wrong |\n| --- | --- | --- | --- |")
    for result in results:
        print(row(result))


if __name__ == "__main__":
    main()
