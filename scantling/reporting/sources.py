"""What a report is made from: every input recognised by its content, and the commands that make it again."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from scantling.compare import SCHEMA as COMPARE_SCHEMA
from scantling.config import load_study
from scantling.errors import InputError
from scantling.laws import LawFit, Saving, SavingAt
from scantling.laws.lawfit import SCHEMA as LAW_SCHEMA
from scantling.record import FILE, RunRecord, find_records
from scantling.resolve import load_spec
from scantling.spec import ModelSpec
from scantling.study import FAILURE_FILE, STUDY_FILE, cells

PLAN_SCHEMA = "scantling.plan/1"
EXPECTED = "expected a study or run folder, the JSON of a law, comparison or plan, or a spec YAML"


@dataclass(frozen=True, eq=False)
class Sources:
    """What a report is made from, in the order it was given.

    Attributes:
        records: finished runs with their folders.
        studies: the study.yaml files in the folders.
        unfinished: name and state of each cell without a record: `failed` (with the last line it printed), or not run.
        laws: laws by family or file name.
        savings: loss-matched savings, and with them the other sentences of their comparisons in `findings`.
        plans: plan JSON by path.
        specs: models by path.
        commands: commands that make the derived inputs again.
    """

    records: list[tuple[Path, RunRecord]] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)
    unfinished: list[tuple[str, str]] = field(default_factory=list)
    laws: dict[str, LawFit] = field(default_factory=dict)
    savings: list[Saving] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    plans: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    specs: list[tuple[Path, ModelSpec]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)


def read_sources(paths: Sequence[Path]) -> Sources:
    """Every input, recognised by content.

    Raises:
        InputError: a path is missing, unreadable, empty, or none of the kinds; every such path at once.
    """
    found = Sources()
    faults: list[str] = []
    if not paths:
        raise InputError(f"report: no input; {EXPECTED}")
    folders = [path for path in dict.fromkeys(paths) if path.is_dir()]
    for path in dict.fromkeys(paths):
        try:
            if path.is_dir():
                _read_folder(path, found)
            elif path.suffix.lower() in (".yaml", ".yml"):
                found.specs.append((path, _spec_file(path)))
            else:
                _read_json(path, found, folders)
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*dict.fromkeys(faults))
    return found


def _read_folder(folder: Path, found: Sources) -> None:
    records = find_records(folder)
    failed = {
        path.parent.name: path for path in sorted(folder.rglob(FAILURE_FILE)) if not (path.parent / FILE).exists()
    }
    if not records and not failed:
        raise InputError(f"{folder}: no finished run ({FILE}) in this folder; {EXPECTED}")
    known = {place.resolve() for place, _ in found.records}
    found.records.extend(item for item in records if item[0].resolve() not in known)
    states = {name: _failure(path) for name, path in failed.items()}
    done = {place.name for place, _ in records}
    known = {path.resolve() for path in found.studies}
    for path in sorted(folder.rglob(STUDY_FILE)):
        if path.resolve() not in known:
            found.studies.append(path)
        missing = [cell.name for cell in cells(load_study(path)) if cell.name not in done]
        states |= {name: "not finished" for name in missing if name not in states}
    found.unfinished.extend(item for item in states.items() if item not in found.unfinished)


def _failure(path: Path) -> str:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        lines = str(value["output"]).strip().splitlines()
        return f"failed (exit {value['exit_code']}): {lines[-1] if lines else 'no output'}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable record of a failure: {error}") from None


def _spec_file(path: Path) -> ModelSpec:
    try:
        return load_spec(path)
    except InputError as error:
        raise InputError(f"{path}: not a model spec; {EXPECTED}", *error.faults) from None


def _read_json(path: Path, found: Sources, folders: Sequence[Path]) -> None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: neither JSON nor a folder ({error}); {EXPECTED}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}; {EXPECTED}")
    study = shlex.quote(str(folders[0])) if folders else "STUDY"
    if value.get("schema") == LAW_SCHEMA:
        law = LawFit.from_json(value, str(path))
        found.laws[_unused(path.stem, found.laws)] = law
        if law.n is not None:
            found.commands.append(f"scantling fit {study}{_fit_options(law)} --out {shlex.quote(str(path))}")
    elif value.get("schema") == COMPARE_SCHEMA:
        _read_comparison(path, value, found, study)
    elif _is_plan(value):
        found.plans.append((path, value))
        found.commands.append(f"scantling plan PLAN.yaml --out {shlex.quote(str(path))}")
    elif "vocab_size" in value or "model_type" in value:
        found.specs.append((path, _spec_file(path)))
    else:
        raise InputError(
            f"{path}: JSON of none of the known kinds (keys {', '.join(map(str, list(value)[:6])) or 'none'}); {EXPECTED}"
        )


def _is_plan(value: Mapping[str, Any]) -> bool:
    candidates = value.get("candidates")
    known = value.get("schema", PLAN_SCHEMA) == PLAN_SCHEMA
    return known and isinstance(candidates, list) and bool(candidates) and all(isinstance(c, dict) for c in candidates)


def _read_comparison(path: Path, value: dict[str, Any], found: Sources, study: str) -> None:
    try:
        laws = {str(name): LawFit.from_json(law, f"{path}, families.{name}") for name, law in value["families"].items()}
        given = value.get("savings") or ([value["saving"]] if value.get("saving") else [])
        savings = [_saving(item) for item in given]
        spoken = {item.sentence() for item in savings}
        findings = [str(sentence) for sentence in value.get("findings", ()) if sentence not in spoken]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: not a comparison as `scantling fit --compare` writes it ({type(error).__name__}: {error}); fit it again"
        ) from None
    for name, law in laws.items():
        found.laws[_unused(name, found.laws)] = law
    found.savings.extend(savings)
    found.findings.extend(findings)
    baseline = f" --baseline {shlex.quote(savings[0].baseline)}" if savings else ""
    options = _fit_options(next(iter(laws.values()))) if laws else ""
    found.commands.append(f"scantling fit {study} --compare family{baseline}{options} --out {shlex.quote(str(path))}")


def _saving(value: Mapping[str, Any]) -> Saving:
    """A saving as it was: JSON has no infinities, so that null stands for an end the resamples never reach."""
    never = -math.inf if value["probability"] is not None else None

    def at(one: Mapping[str, Any]) -> dict[str, float | None]:
        low, high = (never if one[end] is None else one[end] for end in ("low", "high"))
        return {"value": -math.inf if one["value"] is None else one["value"], "low": low, "high": high}

    plain = {item.name: value[item.name] for item in fields(Saving)} | at(value)
    plain |= {"runs": tuple(value["runs"]), "notes": tuple(map(str, value["notes"]))}
    plain["by_multiplier"] = tuple(SavingAt(**{**one, **at(one)}) for one in value["by_multiplier"])
    return Saving(**plain)


def _fit_options(law: LawFit) -> str:
    """The options of `scantling fit` that a law shows in itself; the seed of its bootstrap is not among them."""
    options = "" if law.objective in (None, "huber") else f" --objective {law.objective}"
    options += "" if law.delta in (None, 1e-3) else f" --delta {law.delta:g}"
    options += " --tied" if law.tied else ""
    options += "".join(f" --fix {name}={value!r}" for name, value in law.fixed.items())
    return options + (" --count non_embedding" if counted(law) == "non_embedding" else "")


def counted(law: LawFit) -> str:
    """The parameters that N counts in a law: total or non_embedding."""
    return "non_embedding" if "non_embedding" in law.conventions.get("N", "") else "total"


def _unused(name: str, taken: Mapping[str, Any]) -> str:
    return name if name not in taken else next(new for k in range(2, 10**6) if (new := f"{name} ({k})") not in taken)


def dig(value: Any, *keys: str) -> Any:
    """A value deep inside mappings; None where a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
