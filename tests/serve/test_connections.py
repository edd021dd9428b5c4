"""Connections without a model: how long a client may take over what, how many there are, and who accepts them."""

import contextlib
import logging
import select
import socket
import ssl
import subprocess
import threading
import time
import types

import httpx
import pytest
import uvicorn

from vbdl.serve import Limits, listening
from vbdl.serve.listening import RESERVED

pytest.importorskip("resource")


async def service(scope, receive, send):
    """Reads bodies of /v1/predict, and answers anything else at once."""
    if scope["type"] == "lifespan":
        scope["state"]["serving"] = STATE
        for kind in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{kind}.complete"})
        return
    if scope["path"] == "/v1/predict":
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            more = message.get("more_body", False)
    body = b"x" * (2**25 if scope["path"] == "/large" else 2)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


SERVERS: list[listening.Server] = []
STATE = types.SimpleNamespace(warm=True, failed="")


@contextlib.contextmanager
def served(limits, patiently=False, bound=None, **options):
    """A server in a thread; yields its port."""
    bound = bound or socket.create_server(("127.0.0.1", 0))  # a port that was only looked for may be taken by then
    port = bound.getsockname()[1]
    config = uvicorn.Config(
        service, port=port, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=1, **options
    )
    server = listening.Server(config, limits, patiently)
    SERVERS[:] = [server]
    thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
    thread.start()
    try:
        while not server.started and not patiently:
            assert thread.is_alive()
            time.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def accepting():
    return SERVERS[0].servers[0]


def _connected(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def _request(path="/health", method="GET", body=b"", extra=""):
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n".encode() + body


def _status(port, *arguments):
    with _connected(port) as connection:
        connection.sendall(_request(*arguments))
        with contextlib.suppress(ConnectionError):
            found = connection.recv(4096)
            return int(found.split()[1]) if found else None
    return None


LENGTH = "Content-Length: 1000\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
# what is sent at once, and then again and again
SLOW = {
    "nothing": (b"", b""),
    "newlines before a request": (b"", b"\r\n"),
    "a request line": (b"GE", b"T"),
    "headers": (b"GET / HTTP/1.1\r\nHost: ", b"a"),
    "a body": (_request("/v1/predict", "POST", b"x", LENGTH), b"x"),
    "a body in chunks": (_request("/v1/predict", "POST", b"", CHUNKED), b"1\r\nx\r\n"),
    "a chunk's extension": (_request("/v1/predict", "POST", b"1;", CHUNKED), b"a"),
    "a body that is not read": (_request("/", "POST", b"x", LENGTH), b"x"),
    "a body of GET": (_request("/", "GET", b"x", LENGTH), b"x"),
    "a body of HEAD": (_request("/health", "HEAD", b"x", LENGTH), b"x"),
    "a body of a probe in chunks": (_request("/ready", "GET", b"", CHUNKED), b"1\r\nx\r\n"),
    "a body of another method": (_request("/x", "BREW", b"x", LENGTH), b"x"),
    "a body of no route": (_request("/nothing/there", "PUT", b"x", LENGTH), b"x"),
    "an upgrade": (_request("/", "GET", b"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"), b""),
    "a next request": (_request(), b""),
    "newlines after a request": (_request(), b"\r\n"),
    "a second request": (_request() + b"GET / HT", b"T"),
    "an expectation": (_request("/v1/predict", "POST", b"", LENGTH + "Expect: 100-continue\r\n"), b""),
    "reading": (_request("/large"), b""),
    "reading the last answer": (_request("/large", extra="Connection: close\r\n"), b""),
    "reading many answers": (_request("/large") * 5, b""),
}


@pytest.mark.parametrize("phase", SLOW)
def test_a_client_that_is_slow_at_anything_is_cut(phase):
    first, then = SLOW[phase]
    with served(Limits(body_seconds=0.4)) as port, _connected(port) as slow:
        slow.sendall(first)
        begun, gone = time.monotonic(), False
        while not gone and time.monotonic() - begun < 20:
            time.sleep(0.05)
            try:
                if then:
                    slow.sendall(then)
                if "reading" in phase:  # the kernel still holds what was sent: the server has let go of it
                    gone = bool(select.select([slow], [], [], 0)[0]) and accepting().taken == 0
                elif select.select([slow], [], [], 0)[0]:
                    gone = not slow.recv(4096)
            except OSError:
                gone = True
        assert gone, "it is still there"
        assert _status(port) == 200


def test_a_slow_body_is_answered_with_408_where_its_route_does_not_say_so():
    with served(Limits(body_seconds=0.3)) as port, _connected(port) as slow:
        slow.sendall(_request("/v1/predict", "POST", b"x", LENGTH))
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_a_client_is_cut_that_asks_nothing_after_a_body_that_came_after_its_answer():
    with served(Limits(body_seconds=0.4)) as port, _connected(port) as slow:
        slow.sendall(_request("/", "POST", b"x", "Content-Length: 2\r\n"))
        assert slow.recv(4096).startswith(b"HTTP/1.1 200")
        slow.sendall(b"x")
        assert _gone(slow)


def test_a_pipeline_that_waits_for_the_service_is_not_cut():
    """Requests that wait behind one another are the service's to answer."""
    with served(Limits(body_seconds=0.5)) as port, _connected(port) as client:
        client.sendall(_request("/v1/predict", "POST", b"xx", "Content-Length: 2\r\n") * 50)
        found = b""
        while found.count(b"HTTP/1.1 200") < 50:
            part = client.recv(2**16)
            assert part
            found += part


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        capture_output=True,
    )
    if made.returncode:
        pytest.skip("needs openssl")
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


@pytest.mark.parametrize("phase", ["no handshake", "half a handshake", "silent after it", "a body"])
def test_a_slow_client_of_tls_is_cut(phase, certificate):
    context = ssl._create_unverified_context()
    with served(Limits(body_seconds=0.5, connections=1), **certificate) as port:
        plain = _connected(port)
        if phase == "half a handshake":
            plain.sendall(b"\x16\x03\x01\x02\x00\x01")
        slow = plain
        if phase in ("silent after it", "a body"):
            slow = context.wrap_socket(plain)
        if phase == "a body":
            slow.sendall(_request("/", "POST", b"x", LENGTH))
        with contextlib.suppress(OSError):
            while slow.recv(4096):
                pass
        slow.close()
        # and its place is free again, also that of a handshake
        for _ in range(200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"https://127.0.0.1:{port}/anything", verify=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("its place was not given back")


def test_beyond_the_cap_probes_are_answered_and_nothing_else(caplog):
    caplog.set_level(logging.WARNING)
    with served(Limits(connections=3, body_seconds=20)) as port, contextlib.ExitStack() as stack:
        taken = [stack.enter_context(_connected(port)) for _ in range(3)]
        for connection in taken:
            connection.sendall(_request("/v1/predict", "POST", b"x", LENGTH))
        for _ in range(3):
            assert [_status(port, path) for path in ("/health", "/ready", "/metrics")] == [200] * 3
            assert _status(port, "/v1/predict", "POST") == 503 and _status(port, "/v1/model") == 503
        # the reserve is for one question each
        with _connected(port) as probe:
            probe.sendall(_request())
            found = b""
            while part := probe.recv(4096):
                found += part
            assert found.startswith(b"HTTP/1.1 200") and b"connection: close" in found.lower()
        reserve = [stack.enter_context(_connected(port)) for _ in range(RESERVED)]
        # silent ones in the reserve make room for a probe
        for _ in range(5):
            assert _status(port) == 200 and _status(port, "/v1/model") == 503
        assert sum(bool(select.select([one], [], [], 0)[0]) and _gone(one) for one in reserve) >= 1
        assert not any(select.select([one], [], [], 0)[0] for one in taken)
        for connection in [*taken, *reserve]:
            connection.close()
        for _ in range(200):
            if _status(port, "/anything") == 200:
                break
            time.sleep(0.02)
        assert _status(port, "/anything") == 200
    assert len([r for r in caplog.records if "others are refused" in r.getMessage()]) == 1


def _gone(connection):
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except OSError:
        return True


def test_connections_are_as_many_as_descriptors_allow(monkeypatch, caplog):
    import resource

    limits = Limits(connections=500)
    monkeypatch.setattr("os.listdir", lambda _: ["x"] * 20)
    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: asked.append(pair))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 4096))
    assert listening.connections(limits) == 500 and asked[-1][0] > 520  # what may be raised is
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    found = listening.connections(limits)
    assert 20 < found < 80 - RESERVED and "ulimit" in caplog.text
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(ValueError, match="ulimit"):
        listening.connections(limits)


def test_a_worker_accepts_when_it_is_warm_and_not_before(monkeypatch):
    state = types.SimpleNamespace(warm=False, failed="")
    monkeypatch.setitem(globals(), "STATE", state)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    with served(Limits(), patiently=True, bound=bound) as port:
        for _ in range(20):
            with pytest.raises(ConnectionRefusedError):
                _connected(port)
            time.sleep(0.01)
        state.warm = True
        for _ in range(500):
            with contextlib.suppress(ConnectionRefusedError):
                assert _status(port) == 200
                return
            time.sleep(0.01)
        raise AssertionError("it does not accept")


def test_a_worker_has_one_server_whoever_asks_for_it_first(monkeypatch):
    """The thread that answers the parent asks the server that runs: another one would never be ready."""
    worker = listening.Worker.__new__(listening.Worker)
    worker._server, worker.config = None, None
    made, ran = [], []

    def slowly(config, limits, patiently):
        time.sleep(0.1)
        made.append(types.SimpleNamespace(started=False, run=ran.append))
        return made[-1]

    monkeypatch.setattr(listening, "Server", slowly)
    monkeypatch.setattr("vbdl.serve.run.server_of_parent", lambda: types.SimpleNamespace(limits=None))
    monkeypatch.setattr(worker, "pong", lambda: (worker.server, threading.Event().wait()))
    worker.target(None)
    time.sleep(0.2)
    assert len(made) == 1 and ran == [None]


def test_a_worker_that_is_not_warm_yet_can_be_ended(monkeypatch):
    monkeypatch.setitem(globals(), "STATE", types.SimpleNamespace(warm=False, failed=""))
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    with served(Limits(), patiently=True, bound=bound):
        time.sleep(0.2)
