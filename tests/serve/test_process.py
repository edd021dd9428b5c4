"""The service as a process: a real socket, hostile clients, signals, several workers, TLS, a token."""

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from vbdl.cli import main

BODY = json.dumps({"inputs": [[1.0, 2.0, 3.0, 4.0]]}).encode()
JSON = {"Content-Type": "application/json"}


def _port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(model, *options, compiled=False, **environment):
    """`vbdl serve` as a user starts it; yields the process and its address."""
    command = [sys.executable, "-m", "vbdl.cli", "serve", str(model), *options]
    command += [] if compiled else ["--no-compile"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    scheme = "https" if "--tls-key" in options else "http"
    for _ in range(3):
        process, address, said, reader = _started(command, scheme, environment)
        if process.poll() is None:
            break
        reader.join(5)
        assert "already in use" in "".join(said), "".join(said)  # by another test since it was looked for
    try:
        assert process.poll() is None
        yield process, address, said
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        reader.join(5)


def _started(command, scheme, environment):
    port = _port()
    process = subprocess.Popen([*command, "--port", str(port)], env=environment, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    address = f"{scheme}://127.0.0.1:{port}"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/ready", verify=False).status_code == 200:
                break
        time.sleep(0.1)
    return process, address, said, reader


def _memory(pid):
    """Resident MiB of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def served(arrays_model):
    with serving(arrays_model) as (process, address, said):
        yield process, address, said


def _raw(address, data, pause=0.0, half=False):
    """Bytes to the socket as they are; the status that came back, None where nothing did."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        if half:
            return None
        time.sleep(pause)
        found = connection.recv(4096)
        return int(found.split()[1]) if found.startswith(b"HTTP/1.1 ") else None


def _request(body, **headers):
    lines = ["POST /v1/predict HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in {"Content_Length": len(body), **headers}.items()]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _hostile(random):
    """A request that should not be, and whether the client leaves in the middle of it."""
    body = bytearray(BODY)
    kind = random.randrange(9)
    if kind == 0:  # bytes changed
        for _ in range(random.randint(1, 6)):
            body[random.randrange(len(body))] = random.randrange(256)
        return _request(bytes(body)), False
    if kind == 1:  # cut, and gone
        return _request(bytes(body))[: random.randrange(1, 180)], True
    if kind == 2:  # says it is larger than allowed
        return _request(bytes(body), Content_Length=random.choice([10**7 * 9, 10**12, 10**30])), False
    if kind == 3:  # is larger than allowed, in chunks of no stated total
        chunk = b"40000\r\n" + b" " * 0x40000 + b"\r\n"
        head = _request(b"", Transfer_Encoding="chunked").replace(b"Content-Length: 0\r\n", b"")
        return head + chunk * 40 + b"0\r\n\r\n", False
    if kind == 4:  # nested without end
        return _request(b'{"inputs": ' + b"[" * random.choice([10, 1000, 200_000])), False
    if kind == 5:  # not HTTP
        return random.randbytes(random.randint(1, 400)), random.random() < 0.7
    if kind == 6:  # other shapes
        rows = [[random.choice([1, 2.5, None, "x", True, 1e300]) for _ in range(random.randint(0, 6))]]
        return _request(json.dumps({"inputs": rows * random.randint(0, 3)}).encode()), False
    if kind == 7:  # other methods and places
        line = random.choice(["GET /v1/predict", "DELETE /", "PUT /v1/model", "GET /../../etc/passwd", "POST /%00"])
        return f"{line} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), False
    huge = "a" * random.choice([100, 70_000])  # headers
    return _request(bytes(body), X_Deadline_Ms=random.choice(["-1", "x", "0", huge]), X_Other=huge), False


def test_a_thousand_hostile_requests(served):
    """Malformed, oversized and aborted: no 5xx, no crash, no leak; a good client is answered."""
    process, address, said = served
    seen: dict[int | None, int] = {}

    def run(first):
        generator = random.Random(first)
        for _ in range(125):
            status = _raw(address, *(lambda pair: (pair[0], 0.0, pair[1]))(_hostile(generator)))
            seen[status] = seen.get(status, 0) + 1

    with httpx.Client(base_url=address) as good, concurrent.futures.ThreadPoolExecutor(8) as pool:
        expected = good.post("/v1/predict", content=BODY, headers=JSON).json()
        list(pool.map(run, range(8)))  # once, so that buffers have grown to what they need
        before = _memory(process.pid)
        tasks = [pool.submit(run, seed) for seed in range(8, 16)]
        while not all(task.done() for task in tasks):
            answer = good.post("/v1/predict", content=BODY, headers=JSON)
            assert answer.json() == expected
            time.sleep(0.01)
        for task in tasks:
            task.result()
        assert good.post("/v1/predict", content=BODY, headers=JSON).json() == expected
        metrics = good.get("/metrics").text
    assert process.poll() is None
    assert not [s for s in seen if s is not None and s >= 500], seen
    assert {400, 404, 405, 413, 422} <= set(seen), seen
    assert 'status="5' not in metrics.partition("vbdl_refused_total")[0].replace('route="ready",status="503"', ""), (
        metrics
    )
    waiting = next(line for line in metrics.splitlines() if line.startswith("vbdl_waiting_rows{"))
    assert waiting.endswith(" 0")
    assert _memory(process.pid) - before < 30
    assert not [line for line in said if "Traceback" in line], "".join(said)


def test_slow_clients_are_cut_off_and_hold_nobody_up(arrays_model):
    """One byte at a time, in the headers and in the body; others are answered meanwhile."""
    with serving(arrays_model, "--patience", "1.5") as (_, address, _), httpx.Client(base_url=address) as good:
        host, port = address.removeprefix("http://").split(":")
        slow = []
        for start in (b"", _request(BODY)[:-20]):
            for _ in range(10):
                connection = socket.create_connection((host, int(port)), timeout=10)
                connection.sendall(start or b"POST /v1/pre")
                slow.append(connection)
        begun, alive = time.monotonic(), set(range(20))
        worst = 0.0
        while alive and time.monotonic() - begun < 20:
            for k in list(alive):
                slow[k].setblocking(False)
                try:
                    if slow[k].send(b"x") and slow[k].recv(100) is not None:
                        alive.discard(k)  # answered with 408, or closed
                except BlockingIOError:
                    pass
                except OSError:
                    alive.discard(k)
            sent = time.monotonic()
            assert good.post("/v1/predict", content=BODY, headers=JSON).status_code == 200
            worst = max(worst, time.monotonic() - sent)
            time.sleep(0.1)
        took = time.monotonic() - begun
        for connection in slow:
            connection.close()
        assert not alive and took > 1.0, (alive, took)
        assert worst < 1.5  # who has to wait for a slow client waits for its patience


def test_a_signal_lets_requests_finish(arrays_model):
    with serving(arrays_model, "--batch-wait-ms", "3000") as (process, address, _):
        with httpx.Client(base_url=address, timeout=30) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(client.post, "/v1/predict", content=BODY, headers=JSON) for _ in range(4)]
            while " 4\n" not in client.get("/metrics").text.partition("vbdl_waiting_rows{")[2]:
                time.sleep(0.02)
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert [task.result().status_code for task in asked] == [200] * 4
        assert process.wait(10) in (0, -signal.SIGTERM) and time.monotonic() - begun < 10
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{address}/health")


def test_loopback_by_default_and_names(served):
    process, address, said = served
    listening = subprocess.run(["cat", f"/proc/{process.pid}/net/tcp"], capture_output=True, text=True).stdout
    port = f"{int(address.rsplit(':', 1)[1]):04X}"
    bound = [line.split()[1] for line in listening.splitlines() if f":{port} " in line and " 0A " in line]
    assert bound == [f"0100007F:{port}"]
    assert httpx.get(f"{address}/health", headers={"Host": "evil.example"}).status_code == 421
    assert not [line for line in said if "without" in line]


@pytest.mark.slow
def test_several_workers_share_the_work(arrays_model):
    with serving(arrays_model, "--workers", "2") as (process, address, _):
        seen = set()
        for _ in range(200):
            # a connection of its own each time: the kernel chooses the worker
            with contextlib.suppress(httpx.TransportError):
                answer = httpx.post(f"{address}/v1/predict", content=BODY, headers={**JSON, "Connection": "close"})
                assert answer.status_code in (200, 503)
                text = httpx.get(f"{address}/metrics").text
                seen.add(text.split('worker="')[1].split('"')[0])
            if len(seen) == 2:
                break
        assert len(seen) == 2 and str(process.pid) not in seen


def _workers(process):
    """The processes that a service has begun and that predict."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


class _Load:
    """Clients that ask one thing after the other over kept connections, and count how it ended."""

    def __init__(self, address, clients):
        self.stop, self.statuses, self.lost, self.wrong = threading.Event(), {}, [], 0
        self.address = address
        with httpx.Client(base_url=address) as client:
            self.expected = client.post("/v1/predict", content=BODY, headers=JSON).json()
        self.threads = [threading.Thread(target=self._run, args=(k,)) for k in range(clients)]

    def _run(self, number):
        while not self.stop.is_set():
            with httpx.Client(base_url=self.address, timeout=60) as client:
                try:
                    while not self.stop.is_set():
                        answer = client.post("/v1/predict", content=BODY, headers=JSON)
                        self.statuses[answer.status_code] = self.statuses.get(answer.status_code, 0) + 1
                        self.wrong += answer.status_code == 200 and answer.json() != self.expected
                except httpx.TransportError:
                    self.lost.append(number)

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(60)


def _until(true, seconds=180):
    for _ in range(seconds * 10):
        if true():
            return
        time.sleep(0.1)
    raise AssertionError("it did not come to that")


@pytest.mark.slow
def test_a_worker_that_is_killed_costs_at_most_its_own_requests(arrays_model):
    """Another begins in its place, and takes no request until its model is compiled."""
    with serving(arrays_model, "--workers", "2", compiled=True) as (process, address, said):
        ready = lambda: sum("ready to predict" in line for line in said)
        _until(lambda: ready() == 2)
        with _Load(address, 6) as load:
            for kills in (1, 2):
                time.sleep(2)
                victim = _workers(process)[0]
                os.kill(victim, signal.SIGKILL)
                _until(lambda victim=victim: victim not in _workers(process))
                _until(lambda kills=kills: ready() == 2 + kills)
                time.sleep(2)
        assert set(load.statuses) == {200} and load.statuses[200] > 100, load.statuses
        assert load.wrong == 0 and max(load.lost.count(k) for k in range(6)) <= 2, load.lost  # one a kill
        assert ready() == 4


@pytest.mark.slow
def test_workers_end_with_their_parent(arrays_model):
    """A parent that was killed leaves nobody behind who holds the port."""
    with serving(arrays_model, "--workers", "2") as (process, _, said):
        _until(lambda: sum("ready to predict" in line for line in said) == 2)
        workers = _workers(process)
        process.kill()
        process.wait(10)
        running = lambda pid: Path(f"/proc/{pid}").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()
        _until(lambda: not any(running(pid) for pid in workers), 30)


@pytest.mark.slow
def test_a_reload_costs_nobody_a_wrong_answer(arrays_model):
    """SIGHUP puts new workers, of the model as it is now, in the place of the old ones, one after the other."""
    with serving(arrays_model, "--workers", "2") as (process, address, said):
        ready = lambda: sum("ready to predict" in line for line in said)
        _until(lambda: ready() == 2)
        before = set(_workers(process))
        with _Load(address, 4) as load:
            time.sleep(1)
            process.send_signal(signal.SIGHUP)
            _until(lambda: ready() == 4 and not before & set(_workers(process)))
            time.sleep(1)
        assert set(load.statuses) == {200} and load.wrong == 0
        assert max((load.lost.count(k) for k in range(4)), default=0) <= 2


@pytest.mark.slow
def test_tls_and_a_token(arrays_model, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl")
    (tmp_path / "token").write_text("s3cret\n")
    options = ["--tls-key", str(key), "--tls-certificate", str(certificate), "--token-file", str(tmp_path / "token")]
    with serving(arrays_model, *options) as (process, address, _):
        trusting = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=address, verify=trusting) as client:
            assert client.post("/v1/predict", content=BODY, headers=JSON).status_code == 401
            headers = {**JSON, "Authorization": "Bearer s3cret"}
            assert client.post("/v1/predict", content=BODY, headers=headers).status_code == 200
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert b"s3cret" not in command  # not for everybody's eyes in a list of processes


@pytest.mark.parametrize(
    "options, said",
    [
        (["missing"], "does not exist"),
        (["MODEL", "--tls-key", "x"], "both a certificate and its key"),
        (["MODEL", "--workers", "0"], "at least 1"),
        (["MODEL", "--queue-rows", "1"], "raise queue_rows"),
    ],
)
def test_what_cannot_be_served_is_one_line(arrays_model, options, said, capsys):
    """In this process; the next test is one of its own, and ends with the code that `main` returns."""
    assert main(["serve", *(str(arrays_model) if option == "MODEL" else option for option in options)]) == 1
    message = capsys.readouterr().err
    assert said in message and "Traceback" not in message


def test_a_port_that_is_taken_is_exit_code_1(arrays_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = [str(arrays_model), "--no-compile", "--port", str(taken.getsockname()[1])]
        found = subprocess.run([sys.executable, "-m", "vbdl.cli", "serve", *options], capture_output=True, text=True)
    assert found.returncode == 1 and "already in use" in found.stderr and "Traceback" not in found.stderr
