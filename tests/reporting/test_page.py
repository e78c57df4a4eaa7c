"""The page: what it says, that it is safe and self-contained, and what it refuses."""

import dataclasses
import html
import json
import math
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from scantling.costing import flops_per_token, param_counts
from scantling.errors import InputError
from scantling.files import write_json, write_text
from scantling.record import find_records
from scantling.reporting import report
from scantling.reporting.sources import read_sources
from scantling.resolve import load_spec
from scantling.rows import rows
from tests.reporting.inputs import EVIL, own_text, synthetic_plan

# --- what it says ------------------------------------------------------------------------------------------------------


def test_every_run_and_every_finding_is_on_the_page(inputs: dict[str, Path], page: Path) -> None:
    text = html.unescape(own_text(page))
    records = find_records(inputs["study"])
    assert len(records) == 22
    for folder, record in records:
        assert record.run_hash[:12] in text
        assert record.spec_hash[:12] in text
        assert f"scantling train {folder / 'config.yaml'} --out again/{record.name}" in text
    compare = json.loads(inputs["compare"].read_text())
    for sentence in (*compare["findings"], compare["saving"]["sentence"]):
        assert sentence in text
    for law in compare["families"].values():
        assert all(warning in text for warning in law["warnings"])
        assert f"{law['params']['alpha']:.4g}" in text
    for words in ("diverged after", "out of memory", "not finished", "the training text was seen 1.25 times", "ab" * 6):
        assert words in text
    assert f"scantling fit {inputs['study']} --compare family --baseline uniform --out {inputs['compare']}" in text


def test_one_command_repeats_a_study_and_one_shows_how_to_repeat_a_run(inputs: dict[str, Path], tmp_path: Path) -> None:
    def outside(*paths: Path) -> str:
        text = own_text(report(paths, tmp_path / "report.html"))
        return re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)

    study = f"scantling study {inputs['study'] / 'study.yaml'} --out again</code>"
    whole = outside(inputs["study"], inputs["study"] / "runs")
    assert whole.count(study) == whole.count("scantling study ") == whole.count("scantling train ") == 1
    shutil.copytree(inputs["study"], tmp_path / "other")
    two = outside(inputs["study"], tmp_path / "other")
    assert [f"--out again/{number}" in two for number in (1, 2)] == [True, True] and two.count("scantling train ") == 1
    one = outside(next((inputs["study"] / "runs").glob("uniform*")))
    assert "scantling study " not in one and one.count("scantling train ") == 1


def test_sections_come_in_order_and_only_where_supported(inputs: dict[str, Path], page: Path, tmp_path: Path) -> None:
    def keys(path: Path) -> list[str]:
        return re.findall(r'<section id="(\w+)"', own_text(path))

    assert keys(page) == ["findings", "ladder", "saving", "laws", "shape", "plan", "provenance"]
    for given, expected in {
        "study": ["findings", "ladder", "provenance"],
        "compare": ["findings", "saving", "laws", "provenance"],
        "uniform": ["findings", "laws", "provenance"],
        "plan": ["findings", "shape", "plan", "provenance"],
        "bottleneck": ["findings", "shape", "provenance"],
    }.items():
        made = report([inputs[given]], tmp_path / f"{given}.html")
        assert keys(made) == expected
        levels = [int(level) for level in re.findall(r"<h(\d)", own_text(made))]
        assert levels[0] == 1 and all(b - a <= 1 for a, b in pairwise(levels))
    assert get_plotlyjs() not in (tmp_path / "bottleneck.html").read_text(encoding="utf-8")


def test_a_saving_that_is_not_one_says_so_first(inputs: dict[str, Path], tmp_path: Path) -> None:
    compare = json.loads(inputs["compare"].read_text())
    compare["saving"] |= {"value": 0.02, "low": None, "high": 0.07, "probability": 0.6, "undefined": 4}
    compare |= {"savings": [], "findings": []}
    write_json(tmp_path / "unsure.json", compare)
    text = own_text(report([tmp_path / "unsure.json"], tmp_path / "report.html"))
    assert re.search(r"<p class=.lead.>bowtie is not distinguishable from uniform", text)


def test_a_null_end_is_one_the_resamples_never_reach(inputs: dict[str, Path], tmp_path: Path) -> None:
    compare = json.loads(inputs["compare"].read_text())
    lost = compare["savings"][0] | {
        "low": None,
        "by_multiplier": [{"multiplier": 16.0, "value": None, "low": None, "high": None}] * 2,
    }
    never = lost | {"candidate": "wide", "value": None, "high": None}
    without = lost | {"candidate": "deep", "probability": None, "high": None}
    compare |= {"savings": [lost, never, without], "saving": lost, "findings": []}
    write_json(tmp_path / "lost.json", compare)
    found = read_sources([tmp_path / "lost.json"])
    assert [(one.low, one.high == -math.inf) for one in found.savings] == [
        (-math.inf, False),
        (-math.inf, True),
        (None, False),
    ]
    compare["findings"] = [one.sentence() for one in found.savings]
    write_json(tmp_path / "lost.json", compare)
    text = html.unescape(own_text(report([tmp_path / "lost.json"], tmp_path / "report.html")))
    assert all(text.count(sentence) == 1 for sentence in compare["findings"])
    assert '<td class="num">\u2212\u221e to ' in text
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert json.loads(block, parse_constant=pytest.fail)["data"]


def test_what_was_matched_is_stated(page: Path) -> None:
    text = own_text(page)
    row = re.search(r"bowtie / uniform</th>(.*?)</tr>", text)
    assert row is not None
    cells_of = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
    assert cells_of[0] == "10"  # cells that both families finished
    assert cells_of[2] == cells_of[5] == "1"  # tokens and peak learning rate
    assert "not tuned for each" in text


def test_a_law_of_other_rows_is_not_passed_off_as_theirs(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "widths"
    shutil.copytree(inputs["study"], folder)
    assert "fingerprints differ" not in own_text(report([folder, inputs["compare"]], tmp_path / "same.html"))
    shutil.rmtree(next((folder / "runs").glob("bowtie-8x64-m48*")))
    text = own_text(report([folder, inputs["compare"]], tmp_path / "other.html"))
    assert "The law bowtie was fitted to other rows than the runs of bowtie" in text
    assert "The law uniform was fitted to other rows" not in text


def test_layer_costs_are_the_ones_of_cost(inputs: dict[str, Path], page: Path) -> None:
    spec = load_spec(inputs["bottleneck"])
    text = own_text(page)
    table = rows(spec)
    assert f"{param_counts(table)['total']:,}" in text
    assert f"{flops_per_token(table, 128)['forward']:,}" in text
    for index in range(spec.num_hidden_layers):
        assert f"{sum(row.params for row in table if row.layer == index):,}" in text


# --- that it is safe and self-contained --------------------------------------------------------------------------------


def test_names_cannot_become_markup(inputs: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / 'a<b>&"c'
    for number, (_, record) in enumerate(find_records(inputs["study"])):
        family = EVIL if record.labels["family"] == "bowtie" else "uniform"
        labels = record.labels | {"family": family}
        evil = dataclasses.replace(record, name=f"{EVIL}{number}", labels=labels, warnings=(EVIL,))
        evil.write(folder / "runs" / str(number))
    compare = json.loads(inputs["compare"].read_text().replace("bowtie", json.dumps(EVIL)[1:-1]))
    plan = synthetic_plan()
    plan |= {"law": EVIL, "notes": [EVIL]}
    plan["candidates"][0]["binding"] = EVIL
    write_json(tmp_path / "<img src=x>.json", compare)
    write_json(tmp_path / "plan.json", plan)
    made = report([folder, tmp_path / "<img src=x>.json", tmp_path / "plan.json"], tmp_path / "report.html")
    text = own_text(made)
    assert "<script>alert" not in text and "<img" not in text and "<b>&" not in text
    assert (
        len(re.findall(r"<script\b", text))
        == len(re.findall(r"</script\b", text))
        == 2 + len(re.findall('class="plot"', text))
    )
    assert EVIL in html.unescape(text)
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert json.loads(block)["data"]


def test_nothing_is_loaded_from_elsewhere(page: Path) -> None:
    text = own_text(page)
    assert not re.search(r"""(?:src|href|action)\s*=\s*(?!["']?#)""", text)
    assert not re.search(r"url\(|@import|https?:|<link|<iframe|\bfetch\(", text)
    assert "default-src 'none'" in text
    assert page.stat().st_size < 6e6


def test_the_same_inputs_give_the_same_bytes(inputs: dict[str, Path], page: Path, tmp_path: Path) -> None:
    again = report([inputs[key] for key in ("study", "compare", "plan", "bottleneck")], tmp_path / "again.html")
    assert again.read_bytes() == page.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


# --- what it refuses ---------------------------------------------------------------------------------------------------


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


def _file(name: str, text: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        write_text(path.parent / name, text)
        return path.parent / name

    return write


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "cannot be read"),
        (_empty, "no finished run"),
        (_file("x.json", ""), "neither JSON"),
        (_file("x.json", "[1]"), "expected a JSON object, got list"),
        (_file("x.json", '{"a": 1}'), "none of the known kinds (keys a)"),
        (_file("x.json", '{"candidates": []}'), "none of the known kinds"),
        (_file("x.json", '{"schema": "scantling.compare/1"}'), "not a comparison"),
        (_file("x.json", '{"schema": "scantling.law/1"}'), "missing key"),
        (_file("x.csv", "N,D\n1,2\n"), "neither JSON"),
        (_file("study.yaml", "families: {a: {}}\n"), "not a model spec"),
        (_file("x.json", '{"candidates": [1]}'), "none of the known kinds"),
        (lambda path: _file("input/a/record.json", "{")(path).parent, "not a readable record"),
    ],
)
def test_what_it_cannot_read_is_named(make: Callable[[Path], Path], said: str, tmp_path: Path) -> None:
    path = make(tmp_path / "input")
    with pytest.raises(InputError) as caught:
        report([path], tmp_path / "report.html")
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_all_faults_at_once_and_no_input_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        report([tmp_path / "one.json", tmp_path / "two.json"], tmp_path / "report.html")
    assert len(caught.value.faults) == 2
    with pytest.raises(InputError, match="no input"):
        report([], tmp_path / "report.html")
