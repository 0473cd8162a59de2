"""Settings of the server, and the token that protects it."""

import os
from dataclasses import dataclass
from pathlib import Path

from funnel.errors import FunnelError
from funnel.io import os_errors
from funnel.options import check_options, option

TOKEN_VARIABLE = "FUNNEL_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 8


@dataclass(frozen=True)
class Settings:
    """How to serve. The token is not a field, so that no message can contain it.

    Raises:
        FunnelError: a field has an invalid value.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all interfaces", metavar="HOST")
    port: int = option(8000, "port to listen on; 0 picks a free one", bounds="[0, 65535]")
    token_file: Path | None = option(
        None, f"file with the token that clients must send (default: environment variable {TOKEN_VARIABLE}, if set)"
    )
    batch_wait: float = option(
        2.0, "milliseconds to wait for further texts, if the previous batch had texts of several requests", bounds="[0, 1000]"
    )
    batch_size: int = option(64, "maximum number of texts in a forward pass; 1 turns batching off", bounds="[1, 64]")
    max_queue: int = option(1024, "maximum number of waiting texts; further requests get status 503", bounds="[1, inf)")
    max_texts: int = option(256, "maximum number of texts in a request", bounds="[1, inf)")
    max_body: float = option(1.0, "maximum size of a request's body, in MiB", bounds="(0, 1024]")
    max_file: float = option(100.0, "maximum size of an uploaded file, in MiB", bounds="(0, inf)")
    timeout: float = option(30.0, "seconds after which a request fails with status 504", bounds="(0, 3600]")

    def __post_init__(self) -> None:
        check_options(self)
        if self.max_texts > self.max_queue:
            raise FunnelError(
                f"max_texts {self.max_texts} exceeds max_queue {self.max_queue}; no such request could be queued", "max_texts"
            )

    @property
    def body_bytes(self) -> int:
        """`max_body` in bytes."""
        return int(self.max_body * 2**20)

    @property
    def file_bytes(self) -> int:
        """`max_file` in bytes."""
        return int(self.max_file * 2**20)


def read_token(path: Path | None) -> str | None:
    """The token in a file or, without one, in the environment variable; None if neither is given.

    Raises:
        FunnelError: the file cannot be read, or the token is too short or not printable ASCII.
    """
    if path is not None:
        with os_errors(path):
            token, source = path.read_bytes().decode("utf-8", errors="replace").strip(), str(path)
    elif TOKEN_VARIABLE in os.environ:
        token, source = os.environ[TOKEN_VARIABLE].strip(), TOKEN_VARIABLE
    else:
        return None
    if len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        expected = f"at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces"
        raise FunnelError(f"{source}: invalid token; expected {expected}", None if path is None else "token_file")
    return token
