"""A page that is served for the tests: the serving example, on a free port."""

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scantling.explore import Explorer
from scantling.explore.base import Base, read_base

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
PLAN = EXAMPLES / "plan-serving.yaml"


@contextmanager
def serving(base: Base) -> Iterator[Explorer]:
    """A server of this plan, for as long as it is needed."""
    with Explorer(base, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[Explorer]:
    with serving(read_base(PLAN)) as found:
        yield found


def get(
    server: Explorer, path: str, headers: dict[str, str] | None = None, method: str = "GET", body: bytes | None = None
) -> tuple[int, dict[str, str], str]:
    """(status, headers, text) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in {"Content-Length": str(len(body or b"")), **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read().decode()
    finally:
        connection.close()
