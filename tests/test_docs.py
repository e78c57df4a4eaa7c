"""Everything shown is run: README code blocks, and every YAML under examples."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from scantling.config import load_run, load_study
from scantling.resolve import load_spec
from scantling.yamlio import load, loads

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", blocks("python"))
def test_readme_python_prints_what_it_says(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    out = printed.getvalue()
    assert out.startswith("(1152, 960,") and "237637504 36864" in out and "\n1.973 " in out


@pytest.mark.parametrize("text", blocks("yaml"))
def test_readme_yaml_is_a_spec(text: str, tmp_path: Path) -> None:
    loads(text)
    (tmp_path / "spec.yaml").write_text(text)
    assert load_spec(tmp_path / "spec.yaml").num_hidden_layers == 16


def test_readme_names_the_commands_ci_runs() -> None:
    assert "make test" in README and "make test" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_example_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scantling.planning import load_plan

    value = load(path).value
    if "families" in value:
        load_study(path)
    elif "law" in value and "demo.json" not in str(value["law"]):
        load_plan(path) if path.parent.name != "demo" else loads(path.read_text())
    elif "train" in value:
        load_run(path)
    else:
        load_spec(path)


def test_no_path_of_a_machine_in_what_is_shown() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *EXAMPLES]:
        assert "/work/" not in path.read_text(encoding="utf-8")
