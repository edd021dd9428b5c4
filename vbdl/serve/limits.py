"""The limits of the service on sizes, numbers and times, and the exceptions that end a request."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The limits on everything that requests can use up."""

    body_bytes: int = 8 * 2**20  # of one request's body, counted while it is read
    total_bytes: int = 64 * 2**20  # of all bodies that are being read or waiting
    rows: int = 4096  # rows of one request
    queue_rows: int = 8192  # rows that wait or are being computed
    batch_rows: int = 256  # rows that are computed together
    batch_wait: float = 0.0  # seconds that a request may wait for others to share its batch
    deadline: float = 30.0  # seconds from a request's arrival to its answer, unless the client asks for less
    body_seconds: float = 10.0  # seconds for each step of a client: handshake, headers, body, next request, reading
    connections: int = 1000  # connections of one process
    header_bytes: int = 64 * 2**10

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0 or (value == 0 and name != "batch_wait"):
                raise ValueError(f"{name} must be positive, not {value}")
        if self.rows > self.queue_rows:
            raise ValueError(
                f"a request may have {self.rows} rows, and only {self.queue_rows} may wait: raise queue_rows"
            )


class Refused(Exception):
    """Raised to answer with an error: an HTTP status, a code for programs, one sentence for people."""

    def __init__(self, status: int, code: str, message: str, retry_after: int | None = None):
        message = " ".join(message.splitlines())[:500]  # because parsers repeat parts of the body
        super().__init__(message)
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after


class Gone(Exception):
    """Raised when the client has closed the connection."""
