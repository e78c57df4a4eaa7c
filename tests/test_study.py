"""Studies: the grid, matched tokens, skipping, failures recorded, interruption."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scantling import study as studies
from scantling.compare import compare_families, read_rows, select
from scantling.config import StudyConfig, load_study
from scantling.errors import InputError, RunError
from scantling.record import read_record
from scantling.yamlio import dumps

ROOT = Path(__file__).parent.parent


def small(text: Path, **changes: Any) -> StudyConfig:
    return StudyConfig.model_validate(
        {
            "name": "small",
            "model": {
                "vocab_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2, "max_position_embeddings": 32,
                "tie_word_embeddings": True, "ffn": {"kind": "dense", "expansion": 2},
            },
            "families": {"uniform": {}, "bowtie": {"width": {"bottleneck_ratio": 0.5}, "transition": "carry_forward"}},
            "sizes": [{"hidden_size": 8}, {"hidden_size": 12}],
            "tokens_per_parameter": [0.2],
            "data": {"source": str(text), "validation_fraction": 0.5},
            "train": {"batch_tokens": 256, "sequence_length": 32, "validation_tokens": 512},
            **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study-text")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"the loss of run {number} falls as a power of its tokens\n" * 60)
    return folder


def test_the_grid_is_matched(text: Path) -> None:
    cells = studies.cells(small(text, tokens_per_parameter=[1, 2], seeds=[0, 1]))
    assert len(cells) == 2 * 2 * 2 * 2
    by_cell: dict[tuple[Any, ...], list[Any]] = {}
    for cell in cells:
        by_cell.setdefault((cell.labels["size"], cell.labels["tokens_per_parameter"], cell.labels["seed"]), []).append(
            cell
        )
    for pair in by_cell.values():
        assert {cell.labels["family"] for cell in pair} == {"uniform", "bowtie"}
        assert len({cell.train.tokens for cell in pair}) == 1
        assert len({cell.train.optimizer.learning_rate for cell in pair}) == 1
    assert [cell.train_flops for cell in cells] == sorted(cell.train_flops for cell in cells)
    assert len({cell.hash for cell in cells}) == len(cells)


def test_the_learning_rate_rule(text: Path) -> None:
    rule = {"base": 4e-3, "reference_hidden_size": 8, "exponent": -1}
    rates = {
        cell.labels["size"]: cell.train.optimizer.learning_rate
        for cell in studies.cells(small(text, learning_rate=rule))
    }
    assert rates == {"4x8": 4e-3, "4x12": 2.667e-3}


def test_a_wrong_family_names_itself(text: Path) -> None:
    with pytest.raises(InputError, match=r"families.odd, sizes\[1\].*key/value heads|cannot share"):
        studies.cells(small(text, families={"uniform": {}, "odd": {"num_key_value_heads": 3}}))


def test_dry_run_of_the_demo_costs_nothing(tmp_path: Path) -> None:
    study = load_study(ROOT / "examples/demo/study.yaml")
    table = studies.dry_run(study, tmp_path)
    assert len(table) == 16 and set(table.state) == {"new"} and (table.minutes > 0).all()
    matched = table.pivot(index=["size", "tokens_per_parameter"], columns="family", values="params")
    assert (matched.bowtie / matched.uniform - 1).abs().max() < 0.01  # parameters matched within 1 %


def test_finished_cells_are_skipped_and_failures_do_not_stop_the_rest(text: Path, tmp_path: Path) -> None:
    # a learning rate that diverges for one family, and a family whose sequences do not fit its text
    families = {"uniform": {}, "short": {"vocab_size": 300}}
    study = small(text, families=families, sizes=[{"hidden_size": 8}])
    events: list[str] = []
    blocked = tmp_path / "runs" / studies.cells(study)[0].name
    blocked.mkdir(parents=True)
    (blocked / "config.yaml").write_text("name: other\n")  # this cell's folder is unusable: the run crashes
    table = studies.run_study(study, tmp_path, events.append)
    assert len(table) == 1 and len(list(studies.failures(tmp_path))) == 1
    assert any("failed (exit 2)" in event for event in events)
    (blocked / "config.yaml").unlink()
    events.clear()
    table = studies.run_study(study, tmp_path, events.append)
    assert "1 already finished" in events[0] and len(table) == 2 and not list(studies.failures(tmp_path))
    again = studies.run_study(study, tmp_path, events.append)
    assert list(again.run_hash) == list(table.run_hash)
    with pytest.raises(InputError, match="holds another study"):
        studies.run_study(small(text), tmp_path, events.append)


def test_an_interrupted_study_goes_on(text: Path, tmp_path: Path) -> None:
    study = small(text, families={"uniform": {}}, sizes=[{"hidden_size": 16}], tokens_per_parameter=[10], workers=1)
    (tmp_path / "study.yaml").write_text(dumps(study.model_dump(mode="json")))
    command = [sys.executable, "-m", "scantling", "study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "s")]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    metrics = tmp_path / "s/runs" / studies.cells(study)[0].name / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.stat().st_size > 1000:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert process.returncode == 1 and "run the same command to go on" in said
    assert list((metrics.parent / "checkpoints").glob("step_*"))
    record = metrics.parent / "record.json"
    assert not record.exists()
    studies.run_study(study, tmp_path / "s", lambda _: None)
    rows = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    every = rows[1] - rows[0]
    assert rows == [*range(every, rows[-1], every), rows[-1]]  # nothing is missing or measured twice
    assert rows[-1] == studies.cells(study)[0].train.steps


def test_a_study_without_a_finished_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run finished"):
        studies.run_study(small(tmp_path / "nothing", sizes=[{"hidden_size": 8}]), tmp_path, lambda _: None)
    assert len(list(studies.failures(tmp_path))) == 2


def test_tables_of_studies(text: Path, tmp_path: Path) -> None:
    study = small(text, sizes=[{"hidden_size": width} for width in (8, 12, 16)])
    studies.run_study(study, tmp_path, lambda _: None)
    rows, conventions = read_rows(tmp_path, "total")
    assert conventions is not None and len(rows) == 6 and set(rows.family) == {"uniform", "bowtie"}
    record = read_record(Path(rows.folder[0]))
    assert rows.N[0] == record.params["total"] and rows.C[0] == record.flops["train"]
    assert rows.groupby("cell").D.nunique().max() == 1
    assert set(select(rows, ("family=bowtie",)).family) == {"bowtie"}
    with pytest.raises(InputError, match="no row has it"):
        select(rows, ("family=diamond",))
    with pytest.raises(InputError, match="did you mean 'family'"):
        compare_families(rows, "famly", None, {})
