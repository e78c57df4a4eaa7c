"""The page's server: who may ask, what is answered, and what is refused."""

import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import pytest

import scantling.explore.answer as answer_module
from scantling.cli import main
from scantling.errors import InputError
from scantling.explore import Explorer
from scantling.explore.base import read_base
from scantling.explore.server import HEADERS
from scantling.planning import PlanConfig, load_plan, plan
from tests.explore.conftest import EXAMPLES, PLAN, get, serving

PAGES = ("/", "/explore.css", "/explore.js", "/plotly.js", "/answer", "/draft", "/plan.yaml", "/plan.json")


def raw(server: Explorer, data: bytes) -> bytes:
    """What comes back for these bytes."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        parts = []
        try:
            while part := connection.recv(65536):
                parts.append(part)
        except ConnectionResetError:  # it closed without reading the rest of what was sent
            pass
        return b"".join(parts)


def test_answers_are_the_planners(server: Explorer) -> None:
    wanted = plan(load_plan(PLAN, ["target.loss=2.3", "serving.context=32768"])).to_json()
    status, headers, text = get(server, "/plan.json?target.loss=2.3&serving.context=32768")
    assert status == 200 and json.loads(text) == json.loads(json.dumps(wanted))
    assert headers["content-disposition"] == 'attachment; filename="plan.json"'
    _, _, page = get(server, "/answer?target.loss=2.3&serving.context=32768")
    found, best = json.loads(page), wanted["candidates"][0]
    assert f"{best['num_hidden_layers']} layers \u00d7 {best['hidden_size']}" in found["parts"]["headline"]
    assert f"<dd>{best['loss']:.4f}</dd>" in found["parts"]["tiles"]
    assert f"{best['loss_low']:.4f} to {best['loss_high']:.4f}" in found["parts"]["tiles"]
    assert found["figures"]["loss"]["data"][0]["x"] == sorted(point["cost"] for point in wanted["front"])
    assert found["parts"]["stack"].count('class="layer"') == best["num_hidden_layers"]


@pytest.mark.parametrize("path", PAGES)
def test_every_page_says_what_it_may_do(server: Explorer, path: str) -> None:
    status, headers, text = get(server, path)
    assert status == 200 and text
    assert {name.lower(): value for name, value in HEADERS.items()}.items() <= headers.items()
    assert "access-control-allow-origin" not in headers
    assert get(server, path, method="HEAD")[2] == ""


def test_the_page_refers_to_nothing_elsewhere(server: Explorer) -> None:
    for path in ("/", "/explore.css", "/explore.js"):
        text = get(server, path)[2]
        assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_another_host_is_refused(server: Explorer, host: str, path: str) -> None:
    status, _, text = get(server, path, {"Host": host.format(port=server.server_port)})
    assert status == 403 and "another host" in json.loads(text)["faults"][0]


def test_no_host_at_all_is_refused(server: Explorer) -> None:
    assert raw(server, b"GET / HTTP/1.0\r\n\r\n").split(b" ")[1] == b"403"


def test_both_names_of_this_machine_are_served(server: Explorer) -> None:
    for host in ("127.0.0.1", "localhost", "LOCALHOST"):
        assert get(server, "/answer", {"Host": f"{host}:{server.server_port}"})[0] == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_the_pages_of_other_sites_are_refused(server: Explorer, site: str) -> None:
    assert get(server, "/answer", {"Sec-Fetch-Site": site})[0] == 403
    assert get(server, "/answer", {"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_it_listens_on_127_0_0_1_alone(server: Explorer) -> None:
    assert server.socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5).close()


@pytest.mark.parametrize(
    "path",
    [
        "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/etc/passwd", "/assets/explore.html",
        "/explore.css/../server.py", "/plan.yaml/", "/plan-serving.yaml", "/.%00", "/answer%00", "/index.html", "/favicon.ico",
    ],
)  # fmt: skip
def test_there_are_no_files(server: Explorer, path: str) -> None:
    status, headers, text = get(server, path)
    assert status == 404 and headers["content-type"].startswith("application/json")
    assert json.loads(text) == {"faults": ["there is no such page here"]}


@pytest.mark.parametrize(
    "query", ["law=/etc/passwd", "law=law.json", "hardware.table=x.yaml", "a=<script>", "serving.batch=x"]
)
def test_a_bad_query_is_a_sentence(server: Explorer, query: str) -> None:
    for path in ("/answer", "/draft", "/plan.yaml", "/plan.json"):
        status, _, text = get(server, f"{path}?{query}")
        assert status == 400 and len(json.loads(text)["faults"]) == 1


def test_nothing_can_be_written_or_sent(server: Explorer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"):
        assert get(server, "/answer", method=method, body=b"x")[0] == 501
    assert get(server, "/answer", body=b"x" * 1000)[0] == 200  # a body is never read


def test_sizes_are_bounded(server: Explorer) -> None:
    assert get(server, "/answer?a=" + "b" * 5000)[0] == 400
    host = f"Host: 127.0.0.1:{server.server_port}\r\n".encode()
    assert raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + host + b"\r\n").split(b" ")[1] == b"414"
    assert raw(server, b"GET / HTTP/1.1\r\n" + host + b"X: " + b"a" * 70_000 + b"\r\n\r\n").split(b" ")[1] == b"431"
    assert raw(server, b"GET / HTTP/1.1\r\n" + host + b"X: a\r\n" * 200 + b"\r\n").split(b" ")[1] == b"431"
    assert get(server, "/answer")[0] == 200


def test_what_is_no_request_does_no_harm(server: Explorer) -> None:
    for data in (b"\x00\xff" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b""):
        assert b" 200 " not in raw(server, data)[:20]
    assert get(server, "/answer")[0] == 200


def test_an_infeasible_state_gives_the_planners_sentence(server: Explorer) -> None:
    with pytest.raises(InputError) as caught:
        plan(load_plan(PLAN, ["target.loss=1.5"]))
    status, _, text = get(server, "/answer?target.loss=1.5")
    found = json.loads(text)
    assert status == 200 and "parts" not in found
    assert [fault.split(": ", 1)[1] for fault in found["faults"]] == [
        fault.split(": ", 2)[2] for fault in caught.value.faults
    ]
    assert get(server, "/plan.json?target.loss=1.5")[0] == 400
    assert get(server, "/plan.yaml?target.loss=1.5")[0] == 200


def test_many_at_once_get_the_same_answers_and_each_state_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[PlanConfig] = []

    def counted(config: PlanConfig) -> object:
        solved.append(config)
        return plan(config)

    monkeypatch.setattr(answer_module, "plan", counted)
    queries = [f"/answer?serving.batch={batch}" for batch in (1, 2, 4, 8)] * 6
    with serving(read_base(PLAN)) as server, ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda path: get(server, path)[2], queries))
        one_by_one = [get(server, path)[2] for path in queries]
    assert texts == one_by_one and len(set(texts)) == 4
    assert len(solved) == 4


def test_only_so_many_answers_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module, "KEPT", 3)
    answers = answer_module.Answers(read_base(EXAMPLES / "plan-chinchilla.yaml"))
    from scantling.explore.state import read_state

    for batch in range(1, 7):
        answers.plan(read_state(f"serving.batch={batch}", answers.base))
    assert len(answers._kept) == 3


def test_an_error_inside_is_a_sentence_and_the_server_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: PlanConfig) -> object:
        raise ZeroDivisionError("by nothing")

    with serving(read_base(PLAN)) as server:
        with monkeypatch.context() as patched:
            patched.setattr(answer_module, "plan", broken)
            status, _, text = get(server, "/answer")
        assert status == 500 and json.loads(text)["faults"] == ["internal error: ZeroDivisionError: by nothing"]
        assert get(server, "/answer")[0] == 200


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    path = tmp_path / "a<img src=x onerror=alert(1)>.yaml"
    path.write_text(PLAN.read_text())
    with serving(read_base(path)) as server:
        pages = [get(server, name)[2] for name in ("/", "/answer")]
    assert "<img" not in pages[0] and "&lt;img" in pages[0]
    assert "<img" in json.loads(pages[1])["command"]  # text, put on the page as text


def test_a_taken_port_is_said(server: Explorer) -> None:
    with pytest.raises(InputError, match=f"--port {server.server_port}: .*choose another"):
        Explorer(server.base, server.server_port)
    with pytest.raises(InputError, match="expected 0 to 65535"):
        Explorer(server.base, 70_000)


def test_a_plan_that_cannot_be_read_is_refused_before_it_is_served(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("budget: {training_flops: 1e20}\nlaw: nowhere.json\n")
    with pytest.raises(InputError, match="cannot be read"):
        read_base(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text("budgte: 1\nlaw: chinchilla-epoch\n")
    with pytest.raises(InputError, match="did you mean 'budget'"):
        read_base(tmp_path / "plan.yaml")


def test_the_verb_prints_the_address_serves_and_ends_with_an_interrupt(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "scantling",
        "explore",
        str(PLAN),
        "--port",
        "0",
        "--no-browser",
        "--set",
        "serving.batch=2",
    ]
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    ) as process:
        assert process.stdout is not None
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", process.stdout.readline())
        assert found is not None
        with urlopen(f"{found[0].strip()}plan.yaml", timeout=60) as reply:
            assert "batch: 2" in reply.read().decode()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_verb_refuses_what_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explore", str(tmp_path / "nowhere.yaml"), "--no-browser"])
    assert ended.value.code == 2 and "no such file" in capsys.readouterr().err
