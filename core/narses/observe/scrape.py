"""The HTTP endpoint that Prometheus scrapes: one thread, any path answers with the registry."""

from __future__ import annotations

import socket
from collections.abc import Callable
from socketserver import TCPServer, ThreadingMixIn
from threading import Thread
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from narses.errors import ConfigError

REQUEST_SECONDS = 10


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_SECONDS  # a peer that sends half a request must not keep a thread

    def log_message(self, format: str, *args: object) -> None:
        """A scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    # newer Pythons set SO_REUSEPORT for HTTP servers: a second daemon would silently share the port
    allow_reuse_port = False

    def server_bind(self) -> None:
        # HTTPServer's own method asks the resolver for the host's name and may hang for seconds
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


def serve(registry: CollectorRegistry, host: str, port: int) -> tuple[Callable[[], None], int]:
    """Serve `registry` on host:port: (stop, bound port). ConfigError if the address cannot be bound.

    prometheus_client.start_http_server does the same, but without the three precautions above.
    """
    server_class = _Server6 if ":" in host else _Server
    try:
        server = server_class((host, port), _Handler)
    except OSError as error:
        raise ConfigError(
            f"metrics address {host}:{port} cannot be used ({error.strerror}): choose another, or port 0 for a free one"
        ) from None
    server.set_app(make_wsgi_app(registry))
    thread = Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop, server.server_port
