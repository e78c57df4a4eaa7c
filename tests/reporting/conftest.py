"""The inputs of all pages, made without training, and the page of all of them together."""

from pathlib import Path

import pytest

from scantling.compare import compare_families
from scantling.config import StudyConfig
from scantling.files import write_json, write_text
from scantling.reporting import report
from scantling.study import FAILURE_FILE, STUDY_FILE, cells, collect
from scantling.yamlio import dumps
from tests.reporting.inputs import SETTINGS, STUDY, synthetic_plan, synthetic_record


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A study folder, its comparison, a law, a plan and a spec, made without training."""
    root = tmp_path_factory.mktemp("report")
    study = StudyConfig.model_validate(STUDY)
    folder = root / "widths"
    write_text(folder / STUDY_FILE, dumps(study.model_dump(mode="json")))
    for number, cell in enumerate(cells(study)):
        run = folder / "runs" / cell.name
        if number == 20:
            write_json(
                run / FAILURE_FILE, {"exit_code": 1, "output": "Traceback\nout of memory", "labels": cell.labels}
            )
        elif number != 21:
            synthetic_record(cell, number).write(run)
    table = collect(folder)
    found = compare_families(
        table[table.status == "done"], "family", None, SETTINGS | {"conventions": {"N": "total parameters"}}
    )
    write_json(root / "compare.json", found.to_json())
    write_json(root / "uniform.json", found.families["uniform"].to_json())
    spec = {key: value for key, value in STUDY["model"].items()} | {
        "hidden_size": 192,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
    }
    spec |= {
        "width": {"profile": "geometric", "bottleneck_ratio": 0.3, "turn_layer": 12},
        "transition": "carry_forward",
    }
    write_text(root / "bottleneck.yaml", dumps(spec))
    write_json(root / "plan.json", synthetic_plan())
    return {"root": root, "study": folder, **{path.stem: path for path in root.glob("*.*")}}


@pytest.fixture(scope="session")
def page(inputs: dict[str, Path]) -> Path:
    """The page of all inputs together."""
    return report(
        [inputs[key] for key in ("study", "compare", "plan", "bottleneck")], inputs["root"] / "out" / "report.html"
    )
