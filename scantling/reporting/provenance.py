"""Where the page comes from: every run with its hashes, the runs without a result, and the commands that repeat it all."""

import shlex

from scantling.reporting.markup import (
    NONE,
    Section,
    bullets,
    code_block,
    data_table,
    details,
    known,
    paragraph,
    short_hash,
)
from scantling.reporting.sources import Sources
from scantling.units import format_count, format_flops, format_seconds


def provenance_section(sources: Sources) -> Section:
    """Every run, and how to make everything on the page again."""
    body = [_runs(sources)] if sources.records else []
    body.append(_without_result(sources))
    body += [_repeating(sources)] if sources.records else []
    derived = list(dict.fromkeys(sources.commands))
    if derived:
        left_out = (
            "Options that a law shows in itself are written out; it does not record the seed and the number of the bootstrap "
            "resamples, nor rows left out by --only."
        )
        body.append(
            "<h3>Repeating the fits and plans</h3>"
            + code_block(derived, "commands that repeat fits and plans")
            + paragraph(left_out, kind="note")
        )
    for path, spec in sources.specs:
        body.append(
            code_block(
                [f"scantling cost {shlex.quote(str(path))}  # spec {spec.hash}"], f"command that prices {path.stem}"
            )
        )
    return Section("provenance", "Provenance", "".join(body))


def _runs(sources: Sources) -> str:
    """What is the same for all runs in a sentence, the rest in a table."""
    records = [record for _, record in sources.records]
    about = {
        "precision": [str(record.environment.get("precision", NONE)) for record in records],
        "threads": [str(record.environment.get("threads", NONE)) for record in records],
        "device": [str(record.environment.get("device", NONE)) for record in records],
        "versions": [
            ", ".join(
                f"{key} {r.environment[key]}"
                for key in ("scantling", "torch", "numpy", "python")
                if key in r.environment
            )
            for r in records
        ],
        "data SHA-256": [str(record.data.get("fingerprint", NONE))[:12] for record in records],
    }
    same = {name: values[0] for name, values in about.items() if len(set(values)) == 1}
    differ = [name for name in about if name not in same]
    shared = "; ".join(f"{name} {text}" for name, text in same.items())
    header = ["run", "status", "run hash", "spec hash", "seed", "N", "tokens", "FLOPs", "validation loss", "time"]
    lines: list[list[object]] = []
    for number, record in enumerate(records):
        sizes = [format_count(stage["params"], 4) for stage in (*record.parents, *record.stages[:-1])]
        grown = [f"grown from {' and '.join(sizes)} parameters"] if sizes else []
        lines.append(
            [
                *(record.name, record.status, short_hash(record.run_hash), short_hash(record.spec_hash), record.seed),
                format_count(record.params["total"], 4),
                format_count(record.tokens, 4),
                format_flops(record.flops["train"]),
                known(record.final.get("validation_loss"), "{:.4f}".format),
                known(record.performance.get("seconds"), format_seconds),
                *(about[name][number] for name in differ),
                "; ".join((*record.warnings, *grown)),
            ]
        )
    align = "llllrrrrrr" + "l" * len(differ) + "l"
    return paragraph(f"The same for all runs: {shared}." if shared else "") + data_table(
        "Every run", align, [*header, *differ, "warnings"], lines
    )


def _without_result(sources: Sources) -> str:
    lost = [
        f"{record.name}: diverged after {record.steps:,} steps; it is in no plot and no fit."
        for _, record in sources.records
        if record.status != "done"
    ]
    lost += [f"{name}: {state}; it is in no plot and no fit." for name, state in sources.unfinished]
    return "<h3>Runs without a result</h3>" + bullets(lost, kind="warnings") if lost else ""


def _repeating(sources: Sources) -> str:
    """One command per study and one for a single run; the commands of all runs open when asked for."""
    runs = [
        f"scantling train {shlex.quote(str(folder / 'config.yaml'))} --out {shlex.quote(f'again/{record.name}')}"
        for folder, record in sources.records
    ]
    body = "<h3>Repeating the runs</h3>"
    check = "The run hash of each new record must be the one above."
    if sources.studies:
        several = len(sources.studies) > 1
        studies = [
            f"scantling study {shlex.quote(str(path))} --out {f'again/{number}' if several else 'again'}"
            for number, path in enumerate(sources.studies, 1)
        ]
        said = "Each command trains one study" if several else "This trains the whole study"
        body += paragraph(f"{said} again, in a new folder.", check)
        body += code_block(studies, "commands that repeat the studies") + paragraph("One run alone:")
    else:
        body += paragraph("This trains one run again, in a new folder.", check)
    body += code_block(runs[:1], "command that repeats one run")
    if len(runs) > 1:
        body += details(f"All {len(runs)} runs, one by one", code_block(runs, "commands that repeat each run"))
    return body
