"""The page: its findings first, then the sections that the inputs support.

The page loads nothing: plotly.js, styles and data are inside it, and its content security policy forbids requests. The
same inputs give the same bytes.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

import scantling
from scantling.costing import cost
from scantling.files import write_text
from scantling.reporting.ladder import Ladder, ladder_of, ladder_section
from scantling.reporting.laws import laws_section, saving_section
from scantling.reporting.markup import Html, Section, bullets, paragraph, significant
from scantling.reporting.plans import plan_section, plan_sentence
from scantling.reporting.provenance import provenance_section
from scantling.reporting.shapes import planned_shapes, shapes_section
from scantling.reporting.sources import Sources, read_sources
from scantling.units import format_bytes, format_count, format_flops


def report(paths: Sequence[Path], out: Path) -> Path:
    """Write the page.

    Args:
        paths: study or run folders; law, comparison and plan JSON; spec YAML.
        out: the HTML file.

    Returns:
        `out`.

    Raises:
        InputError: an input is missing, unreadable, empty or of no known kind; every such one is named.
        RunError: the page cannot be written.
    """
    sources = read_sources([Path(path) for path in paths])
    names = list(dict.fromkeys(Path(path).resolve().name for path in paths))
    folders = [Path(path).resolve().name for path in paths if Path(path).is_dir()]
    title = ", ".join(dict.fromkeys(folders or [Path(name).stem for name in names]))
    write_text(Path(out), page(sources, title, ", ".join(names)))
    return Path(out)


def page(sources: Sources, title: str, inputs: str) -> str:
    """The HTML of what was read, with the names of the inputs."""
    ladder = ladder_of(sources)
    shapes = [item for path, plan in sources.plans for item in planned_shapes(plan, path)]
    shapes += [(path.stem, spec, cost(spec), "bf16") for path, spec in sources.specs]
    sections = [
        _headline(sources, ladder),
        ladder_section(ladder, sources) if ladder is not None else None,
        saving_section(sources.savings, ladder.looks if ladder else {}) if sources.savings else None,
        laws_section(sources.laws, ladder) if sources.laws else None,
        shapes_section(shapes) if shapes else None,
        plan_section(sources.plans) if sources.plans else None,
        provenance_section(sources),
    ]
    return assemble([section for section in sections if section is not None and section.body], title, inputs)


def assemble(shown: Sequence[Section], title: str, inputs: str) -> str:
    """The HTML of some sections under a title, with the names of what they were made from."""
    contents = "".join(f'<li><a href="#{section.key}">{escape(section.title)}</a></li>' for section in shown)
    body = "".join(
        f'<section id="{s.key}" aria-labelledby="{s.key}-title"><h2 id="{s.key}-title">{escape(s.title)}</h2>{s.body}</section>'
        for s in shown
    )
    assets = files("scantling.reporting") / "assets"
    shell, style, plots, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("report.html", "report.css", "plots.js", "report.js")
    )
    return Template(shell).substitute(
        title=escape(title),
        inputs=escape(inputs),
        version=escape(scantling.__version__),
        contents=contents,
        body=body,
        style=style,
        script=plots + script,
        library=f"<script>{get_plotlyjs()}</script>" if 'class="plot"' in body else "",
    )


def _headline(sources: Sources, ladder: Ladder | None) -> Section:
    main = [item.sentence() for item in sources.savings]
    main += [plan_sentence(plan) for _, plan in sources.plans]
    rest = list(sources.findings)
    if ladder is not None:
        rest.append(_runs_sentence(ladder, sources.unfinished))
    if not sources.findings:
        for name, law in sources.laws.items():
            n = f"fitted to {law.n} runs" if law.n else law.source
            shown = [(key, value) for key, value in law.params.items() if key not in law.ties]
            values = ", ".join(f"{key} = {significant(value)}" for key, value in shown[:8])
            rest.append(f"{name}: {law.predicts} = {law.formula.text} with {values}; {n}.")
    for path, spec in sources.specs:
        price = cost(spec)
        rest.append(
            f"{path.stem}: {format_count(price.params['total'], 4)} parameters, "
            f"{format_flops(price.flops_per_token['forward'])} forward per token "
            f"and {format_bytes(price.kv_cache_bytes)} of KV cache at {price.context:,} tokens of context."
        )
    lead = main or rest[:1]
    warned = any(law.warnings for law in sources.laws.values())
    note = Html('The fits carry warnings; they are listed with <a href="#laws">the laws</a>.') if warned else ""
    return Section(
        "findings",
        "Findings",
        "".join(paragraph(s, kind="lead") for s in lead) + bullets(rest if main else rest[1:]) + paragraph(note),
    )


def _runs_sentence(ladder: Ladder, unfinished: Sequence[tuple[str, str]]) -> str:
    done, diverged = len(ladder.done), int((ladder.table.status == "diverged").sum())
    text = f"{done} finished runs"
    if diverged:
        text += f", {diverged} diverged"
    if unfinished:
        text += f", {len(unfinished)} failed or not finished"
    if done:
        best = ladder.done.sort_values("loss").to_dict("records")[0]
        text += f"; the lowest validation loss is {best['loss']:.4f} nats per token ({best['run']})"
    return text + "."
