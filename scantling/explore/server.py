"""The page's server: for this machine alone, a few fixed addresses, no files, no writing, answers as JSON.

It listens on 127.0.0.1 only and refuses a request whose Host is another name (a foreign site that resolves to this machine)
or that another site's page sends. It reads nothing from disk after it starts, and every part of a query is read by `state`.
"""

import json
import sys
import webbrowser
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import urlsplit

from scantling.errors import InputError
from scantling.explore.answer import Answers
from scantling.explore.base import Base
from scantling.explore.page import assets
from scantling.explore.state import plan_yaml, read_state

ADDRESS = "127.0.0.1"
PORT = 8642
PATIENCE = 10.0  # seconds for a request to arrive
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
Body = tuple[str, bytes, dict[str, str]]  # type, content, further headers


class Explorer(ThreadingHTTPServer):
    """Serves one plan.

    Args:
        base: the plan that the page starts from.
        port: 0 for any free one.

    Raises:
        InputError: the port is taken or not to be had.
    """

    daemon_threads = True

    def __init__(self, base: Base, port: int = PORT) -> None:
        if not 0 <= port <= 65535:
            raise InputError(f"--port: expected 0 to 65535, got {port}")
        self.base, self.answers, self.assets = base, Answers(base), assets(base)
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise InputError(f"--port {port}: {error.strerror}; choose another, or 0 for any free one") from None

    def server_bind(self) -> None:
        """Without the look-up of this machine's name that `HTTPServer` does."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Explorer
    timeout = PATIENCE
    server_version, sys_version = "scantling", ""

    def do_GET(self) -> None:
        self._reply()

    def do_HEAD(self) -> None:
        self._reply()

    def _reply(self) -> None:
        try:
            status, body = HTTPStatus.OK, self._answer()
        except _Refused as refused:
            status, body = refused.status, _json({"faults": [str(refused)]})
        except InputError as error:
            status, body = HTTPStatus.BAD_REQUEST, _json({"faults": list(error.faults)})
        except Exception as error:
            said = f"internal error: {type(error).__name__}: {error}"
            status, body = HTTPStatus.INTERNAL_SERVER_ERROR, _json({"faults": [said]})
        kind, content, more = body
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _answer(self) -> Body:
        port, host = self.server.server_port, (self.headers.get("Host") or "").lower()
        if host not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            raise _Refused(HTTPStatus.FORBIDDEN, f"expected a request to {ADDRESS}:{port}, got one to another host")
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _Refused(HTTPStatus.FORBIDDEN, "expected a request of this page, got one of another site")
        url = urlsplit(self.path)
        if url.path in self.server.assets:
            return (*self.server.assets[url.path], {})
        routes: dict[str, Callable[[str], Body]] = {
            "/answer": self._page_answer,
            "/draft": self._page_draft,
            "/plan.yaml": self._plan_yaml,
            "/plan.json": self._plan_json,
        }
        if url.path not in routes:
            raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page here")
        return routes[url.path](url.query)

    def _page_answer(self, query: str) -> Body:
        return _json(self.server.answers.page(read_state(query, self.server.base)))

    def _page_draft(self, query: str) -> Body:
        return _json(self.server.answers.page(read_state(query, self.server.base), draft=True))

    def _plan_yaml(self, query: str) -> Body:
        text = plan_yaml(self.server.base, read_state(query, self.server.base))
        return "application/yaml; charset=utf-8", text.encode(), _download("plan.yaml")

    def _plan_json(self, query: str) -> Body:
        found = self.server.answers.plan(read_state(query, self.server.base))
        return _json(found.to_json(), _download("plan.json"))

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class _Refused(Exception):
    """A request that gets a sentence instead of an answer."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


def _json(value: dict[str, Any], more: dict[str, str] | None = None) -> Body:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return "application/json; charset=utf-8", text.encode(), more or {}


def _download(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def serve(base: Base, port: int = PORT, browser: bool = True) -> None:
    """Serve the page until it is interrupted.

    Args:
        base: the plan that the page starts from.
        port: 0 for any free one.
        browser: whether to open it.

    Raises:
        InputError: the port is not to be had.
    """
    with Explorer(base, port) as explorer:
        print(explorer.url, flush=True)
        print("only this machine can open it; Ctrl-C ends it", file=sys.stderr, flush=True)
        if browser:
            webbrowser.open(explorer.url)
        try:
            explorer.serve_forever()
        except KeyboardInterrupt:
            return
