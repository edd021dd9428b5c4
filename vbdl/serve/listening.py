"""A uvicorn server with its own accept loop: it counts connections from the moment they are accepted, before the TLS
handshake, and keeps some file descriptors for probes."""

import asyncio
import contextlib
import errno
import functools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.config import STARTUP_FAILURE, Config
from uvicorn.supervisors.multiprocess import Process

from vbdl.serve.limits import Limits
from vbdl.serve.protocol import Patient

RESERVED = 16  # connections reserved for probes, once all others are taken
READY = 600  # seconds for a new worker to become warm; after that the old worker is kept
_SILENT = 30  # seconds after which a worker that does not answer its parent is killed
_AGAIN = 5  # seconds until a worker that failed to warm up is started again
_FILES = 32  # file descriptors for everything but connections: files, pipes and later ones
_log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """A server that accepts as many connections as the limits and the file descriptors allow.

    patiently: whether it accepts connections only once its model is warm, because other workers accept them until then.
    """

    def __init__(self, config: Config, limits: Limits, patiently: bool = False):
        super().__init__(config)
        self.limits, self.patiently = limits, patiently

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.servers: list[Accepting] = []
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        serving = self.lifespan.state["serving"]
        while self.patiently and not serving.warm and not self.should_exit:
            if serving.failed:
                _log.error("this worker ends, and another is begun in its place: %s", serving.failed)
                await asyncio.sleep(_AGAIN)
                sys.exit(1)
            await asyncio.sleep(0.05)
        if self.should_exit:
            self.started = True  # running requests are finished
            return
        try:
            most = connections(self.limits)
            listening = sockets or list(_bound(self.config.host, self.config.port))
            for one in listening:
                one.setblocking(False)
                one.listen(self.config.backlog)
        except (OSError, ValueError) as error:
            _log.error("%s", error)
            await self.lifespan.shutdown()
            sys.exit(STARTUP_FAILURE)
        self.servers = [Accepting(self, one, most) for one in listening]
        self.started = True
        if not sockets:
            self._log_started_message(listening)


def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket for each address of the host."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            bound.bind(address)
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRNOTAVAIL and len(addresses) > 1:
                continue  # a host name may have addresses that this machine lacks
            raise OSError(f"{host}:{port}: {error.strerror}") from None
        yield bound


def connections(limits: Limits) -> int:
    """The number of connections to accept: the limit, or fewer if there are not enough file descriptors."""
    try:
        import resource
    except ImportError:  # Windows
        return limits.connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    wanted = used + limits.connections + RESERVED + _FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return limits.connections
    most = soft - used - RESERVED - _FILES
    if most < 1:
        raise ValueError(f"{soft} open files are allowed, {used} are open: raise `ulimit -n` above {wanted}")
    _log.warning("%d connections are taken at most, for %d open files are allowed: see `ulimit -n`", most, soft)
    return most


class Accepting:
    """An accept loop on one socket, with the methods of asyncio.Server that uvicorn calls."""

    def __init__(self, server: Server, listening: socket.socket, most: int):
        self._server, self._listening, self._most = server, listening, most
        self._loop = asyncio.get_running_loop()
        self.taken, self._has_warned = 0, False
        self._tasks: set[asyncio.Task] = set()
        self._reserve: dict[asyncio.Task, Patient | None] = {}  # oldest first; None during the TLS handshake
        self._again: asyncio.TimerHandle | None = None
        self._listen()

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listening)
        for task in self._tasks:
            task.cancel()
        self._listening.close()

    async def wait_closed(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _listen(self) -> None:
        self._again = None
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        """Accept one connection; the next one may go to another worker."""
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                _log.warning("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self._listening)
                self._again = self._loop.call_later(0.5, self._listen)
            return  # another worker has accepted it, or the client has left
        if self.taken >= self._most and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%d connections are open: others are refused, but for probes (logged once; see --max-connections)",
                self.taken,
            )
        reserved = self.taken >= self._most
        if self.taken >= self._most + RESERVED:
            self._drop_one()  # a probe sends its request at once, so the oldest reserved connection is not a probe
        if self.taken >= self._most + 2 * RESERVED:
            connection.close()
            return
        self.taken += 1
        task = self._loop.create_task(self._begin(connection, reserved))
        if reserved:
            self._reserve[task] = None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _drop_one(self) -> None:
        if self._reserve:
            task = next(iter(self._reserve))
            protocol = self._reserve.pop(task)
            if protocol is None:
                task.cancel()
            elif protocol.transport is not None:
                protocol.transport.abort()

    async def _begin(self, connection: socket.socket, reserved: bool) -> None:
        """Start the protocol on a connection, after the handshake if TLS is on."""
        server, task = self._server, asyncio.current_task()
        assert task is not None
        ended = _Once(functools.partial(self._ended, task))

        def protocol() -> Patient:
            return Patient(
                config=server.config,
                server_state=server.server_state,
                app_state=server.lifespan.state,
                limits=server.limits,
                reserved=reserved,
                ended=ended,
            )

        seconds = server.limits.body_seconds
        patience = {"ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": seconds} if server.config.ssl else {}
        try:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _, patient = await self._loop.connect_accepted_socket(
                protocol, connection, ssl=server.config.ssl, **patience
            )
            if task in self._reserve:
                self._reserve[task] = patient
        except asyncio.CancelledError:
            connection.close()
            ended()
            raise
        except Exception:  # the handshake failed or took too long
            connection.close()
            ended()

    def _ended(self, task: asyncio.Task) -> None:
        self.taken -= 1
        self._reserve.pop(task, None)


class _Once:
    """A callable that calls a function the first time and does nothing afterwards."""

    def __init__(self, call: Callable[[], object]):
        self._call = call

    def __call__(self) -> None:
        call, self._call = self._call, lambda: None
        call()


class Worker(Process):
    """A worker process whose server accepts connections once its model is warm."""

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        """Run the server in the worker process."""
        _ = self.server  # created here, because the thread that answers the parent could create a second one
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().target(sockets)

    def is_alive(self, timeout: float = 5) -> bool:
        return super().is_alive(min(timeout, _SILENT))

    @property
    def server(self) -> uvicorn.Server:
        if self._server is None:
            from vbdl.serve.run import server_of_parent

            self._server = Server(self.config, server_of_parent().limits, patiently=True)
        return self._server


def _end_with_parent() -> None:
    """End this worker when its parent is killed; otherwise it would hold the port for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
