"""Runs the application: listening, signals, shutdown."""

import ipaddress
import logging
import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from funnel.errors import FunnelError, error_reason
from funnel.serving.app import create_app
from funnel.serving.service import Service
from funnel.serving.settings import Settings

BACKLOG = 2048  # connections that wait to be accepted
SHUTDOWN_SECONDS = 20  # for requests that are being processed


def bind(settings: Settings) -> socket.socket:
    """A socket bound to the host and port, which does not accept connections yet.

    Raises:
        FunnelError: the port is in use, or the host is not an address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise FunnelError(f"host {settings.host}: {error_reason(error)}; use an address of this machine", "host") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        message = f"port {settings.port}: cannot listen on {settings.host} ({error_reason(error)}); choose another one"
        raise FunnelError(message, "port") from None
    return listener


def url_of(listener: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only programs on this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


class _Server(uvicorn.Server):
    """Tells the service about the first signal."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.is_stopping = True
        super().handle_exit(sig, frame)


def run(service: Service, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C, then finishes the requests being processed and returns."""
    app: FastAPI = create_app(service)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # invalid requests are warnings
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    # uvicorn raises the signal again after the shutdown; it must not end the process then.
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _Server(config, service).run(sockets=[listener])
    finally:
        service.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
