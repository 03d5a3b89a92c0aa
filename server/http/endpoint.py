"""`/metrics`, `/healthz` and `/readyz`, on a thread of their own.

The threads only read, so a scrape never waits for the event loop, nor a request for a scrape.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from manylora.errors import FailedPrecondition

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger(__name__)


class HttpEndpoint:
    """The HTTP server. `/healthz`: the process is alive. `/readyz`: 200 only while `ready()`.

    Raises:
        FailedPrecondition: the address cannot be listened on.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, ready: Callable[[], bool]
    ) -> None:
        try:
            self._server = _Server(host, port)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot listen: {error.strerror}", field="http_port", found=f"{host}:{port}"
            ) from None
        self._server.set_app(_application(registry, ready))
        self._thread = threading.Thread(target=self._server.serve_forever, name="manylora-http")

    @property
    def port(self) -> int:
        """The port in use, also where 0 was asked for."""
        return self._server.server_port

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        """As the base's, without its look-up of the host's full name, which may hang."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """Clients that say nothing, or go, are no news either."""
        logger.debug("HTTP with %s failed", client_address, exc_info=True)


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds that a silent client may hold a thread

    def log_message(self, format: str, *args: object) -> None:
        """Scrapes are not news."""


def _application(registry: CollectorRegistry, ready: Callable[[], bool]) -> WSGIApplication:
    metrics: WSGIApplication = make_wsgi_app(registry)

    def application(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        match environ["PATH_INFO"]:
            case "/metrics":
                return metrics(environ, start)
            case "/healthz":
                return _text(start, "200 OK", "alive")
            case "/readyz" if ready():
                return _text(start, "200 OK", "ready")
            case "/readyz":
                return _text(start, "503 Service Unavailable", "starting or draining")
            case _:
                return _text(start, "404 Not Found", "try /metrics, /healthz or /readyz")

    return application


def _text(start: StartResponse, status: str, body: str) -> list[bytes]:
    start(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [f"{body}\n".encode()]
