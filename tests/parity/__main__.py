"""Run every case of the known formats found below a folder; exit 0 only if all agree."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.parity import gpt_variants, growth, structured_ffn, variable_width, variable_width_models
from tests.parity.check import Case, Checks

FORMATS = (variable_width, variable_width_models, structured_ffn, gpt_variants, growth)


def find(root: Path) -> Iterator[tuple[Path, Path, list[Case]]]:
    """Folder, JSON file and its cases (none when it is of no known format), for every JSON file below `root`."""
    for path in sorted(root.rglob("*.json")):
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            cases = next((list(found) for module in FORMATS if (found := module.cases(path, data)) is not None), [])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            cases = [Case("file", path.stem, partial(_unreadable, f"{type(error).__name__}: {error}"))]
        yield path.parent, path, cases


def _unreadable(reason: str, checks: Checks) -> None:
    checks.faults.append(f"cannot be read as cases: {reason}")


def main(argv: list[str]) -> int:
    """Print failures, a summary per folder and kind, and the totals."""
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print("usage: python -m tests.parity DIR (a folder with recorded cases somewhere below it)", file=sys.stderr)
        return 2
    root = Path(argv[0])
    passed: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    others: Counter[str] = Counter()
    for folder, path, cases in find(root):
        name = str(folder.relative_to(root))
        label = folder.resolve().name if name == "." else name
        if not cases:
            others[label] += 1
            continue
        for case in cases:
            checks = case.checked()
            (passed if checks.passed else failed)[label, case.kind] += 1
            if not checks.passed:
                print(f"FAILED {label}/{path.name} {case.kind} {case.name}: {checks.line()}")
    for key in sorted(passed.keys() | failed.keys()):
        print(f"{key[0]} {key[1]}: {passed[key]} of {passed[key] + failed[key]} passed")
    for label, count in sorted(others.items()):
        print(f"{label}: {count} JSON files of no known format, not run")
    print(f"{passed.total()} passed, {failed.total()} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
