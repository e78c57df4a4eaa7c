"""What was fitted: the loss-matched saving between families, and the laws with their intervals and certificates."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from scantling.laws import LawFit, Saving
from scantling.reporting import figures
from scantling.reporting.ladder import Ladder
from scantling.reporting.lawplots import fit_figure, profile_figure, residual_figure, slug
from scantling.reporting.markup import (
    NONE,
    Html,
    Section,
    bullets,
    data_table,
    known,
    paragraph,
    percent,
    plot,
    short_hash,
    significant,
    span,
)
from scantling.units import format_count, format_flops

SYMBOLS = {"alpha": "\u03b1", "beta": "\u03b2", "gamma": "\u03b3", "delta": "\u03b4", "eta": "\u03b7"}


def saving_section(found: Sequence[Saving], looks: Mapping[str, figures.Style]) -> Section:
    """Each candidate's saving on each path, and the joint fits it comes from."""
    names = list(dict.fromkeys([found[0].baseline, *(item.candidate for item in found)]))
    looks = {**figures.styles(names), **looks}
    definition = Html(
        "The saving S(C<sub>0</sub>) = 1 \u2212 C<sub>B</sub>(L<sub>A</sub>(C<sub>0</sub>)) / C<sub>0</sub> is the share of "
        "C<sub>0</sub> training FLOPs that the candidate B can do without and still reach the loss that the baseline A reaches "
        "with C<sub>0</sub>; it is positive when B needs less."
    )
    rule = (
        "All runs are fitted at once with one floor E and one exponent \u03b7 of compute for both families; C counts the FLOPs "
        "of each architecture. "
        "The cross is the model-free check: the baseline's measured losses interpolated at the candidate's."
    )
    body = paragraph(definition) + plot(
        figures.savings(found, looks), "saving", f"Loss-matched saving over {found[0].baseline}, with 95% intervals"
    )
    body += paragraph(rule, kind="note")
    table: list[tuple[str, ...]] = []
    for item in found:
        check = NONE if item.measured is None else f"{percent(item.measured)} ({item.measured_points} points)"
        stated = significant(item.multiplier, 3) if item.multiplier else "one path"
        table.append(
            (
                *(f"{item.candidate} over {item.baseline}", stated, percent(item.value)),
                *(span(item.low, item.high, percent), percent(item.probability), check),
                *(format_flops(item.compute), f"{item.runs[0]} and {item.runs[1]}"),
            )
        )
        for one in item.by_multiplier if len(item.by_multiplier) > 1 else ():
            interval = span(one.low, one.high, percent)
            table.append(("", significant(one.multiplier, 3), percent(one.value), interval, "", "", "", ""))
    header = ("families", "tokens per parameter", "S", "95% interval", "P(S > 0)", "model-free", "at C0", "runs")
    body += data_table("The saving on each path", "lrrrrrrr", header, table)
    fits = [
        (
            f"{item.candidate} over {item.baseline}",
            significant(item.E),
            significant(item.eta),
            percent(item.residual_sd, 2),
            percent(item.held_out_shared, 2),
            percent(item.held_out_separate, 2),
            item.undefined,
            item.bootstrap,
        )
        for item in found
    ]
    fit_header = (
        "families|E|\u03b7|residual sd|held-out error, one \u03b7|held-out error, two \u03b7|"
        "undefined resamples|interval from"
    )
    body += data_table("The joint fits behind it", "lrrrrrrl", fit_header, fits)
    weak = dict.fromkeys(f"{item.candidate}: {note}." for item in found for note in item.notes)
    return Section("saving", "Loss-matched saving", body + bullets(weak, kind="warnings"))


# --- the laws ----------------------------------------------------------------------------------------------------------


def laws_section(laws: Mapping[str, LawFit], ladder: Ladder | None) -> Section:
    """The parameters of each law, how it was fitted, what it predicted unseen, how sure it is, and what it warns of."""
    texts = dict.fromkeys(f"{law.predicts} = {law.formula.text}" for law in laws.values())
    body = paragraph(
        f"{'; '.join(texts)}; losses in nats per token. Each value stands above its 95% interval.",
        "Intervals are marginal: a prefactor is correlated with its exponent, so that their ends must not be combined.",
    )
    table: list[list[object]] = []
    for name in dict.fromkeys(key for law in laws.values() for key in law.params):
        shown_name = Html(f"<i>{SYMBOLS.get(name, escape(name))}</i>")
        table.append([shown_name, *(_parameter(law, name) if name in law.params else NONE for law in laws.values())])
    facts: dict[str, Any] = {
        "rows fitted (runs)": lambda law: known(law.n, lambda n: f"{n}" + (f" ({law.n_runs})" if law.n_runs else "")),
        "objective": _objective,
        "objective at the minimum": lambda law: significant(law.objective_value, 6),
        "tied": lambda law: (
            "one exponent" if law.tied else ", ".join(f"{a} = {b}" for a, b in law.ties.items()) or "none"
        ),
        "bounds": lambda law: ", ".join(f"{name} {span(*ends)}" for name, ends in law.bounds.items()) or NONE,
        "residual sd": lambda law: percent(law.residual_sd, 2),
        "starts reaching the minimum": lambda law: known(
            law.certificate, lambda found: f"{found.agreeing} of {found.starts}"
        ),
        "distinct minima found": lambda law: known(law.certificate, lambda found: f"{max(1, len(found.basins))}"),
        "relative gradient there": lambda law: known(law.certificate, lambda found: significant(found.gradient, 2)),
        "condition number": lambda law: known(law.certificate, lambda found: significant(found.condition, 3)),
        "N fitted": lambda law: _range(law, "N", format_count),
        "D fitted": lambda law: _range(law, "D", format_count),
        "D/N fitted": lambda law: _range(law, "M", lambda value: significant(value, 3)),
        "losses fitted": lambda law: _range(law, "loss", "{:.3f}".format),
        "intervals from": lambda law: law.bootstrap,
        "rows, SHA-256": lambda law: known(law.fingerprint or None, short_hash),
    }
    for label, shown in facts.items():
        cells_of = [shown(law) for law in laws.values()]
        if any(cell != NONE for cell in cells_of):
            table.append([label, *cells_of])
    body += data_table("Fitted laws", "l" + "r" * len(laws), ("", *laws), table)
    held = [
        [
            *(name, item.rule, item.n_fit, item.n_held),
            *(percent(item.are, 2), percent(item.bias, 2, sign=True), percent(item.baseline_are, 2)),
            *(percent(item.reducible_are, 2), percent(item.tied_are, 2)),
            known(item.compute_ratio, "{:.2g}".format),
        ]
        for name, law in laws.items()
        for item in (*law.holdouts, *law.extrapolation)
    ]  # fmt: skip
    header = (
        "law|held out|rows fitted|rows held out|mean error (ARE)|signed bias|"
        "error of \u201clowest loss so far\u201d|error of the reducible loss|with equal exponents|held-out / fitted compute"
    )
    if held:
        body += data_table("Predicting what the fit did not see", "llrrrrrrrr", header, held)
        notes = {
            "loss": "A negative bias is too optimistic: the runs came out worse than the law said.",
            "N": "Of best sizes the errors are those of N, beside the best size of the dearest budget fitted.",
        }
        kinds = dict.fromkeys(law.predicts for law in laws.values() if law.holdouts or law.extrapolation)
        body += paragraph(*(notes[kind] for kind in kinds if kind in notes), kind="note")
    body += "".join(_certainty(name, law) for name, law in laws.items())
    counted = dict.fromkeys(f"{name}: {text}" for law in laws.values() for name, text in law.conventions.items())
    body += paragraph(f"How things are counted. {'; '.join(counted)}.", kind="note") if counted else ""
    warnings = [f"{name}: {sentence}." for name, law in laws.items() for sentence in law.warnings]
    body += "<h3>Warnings of the fits</h3>" + bullets(warnings, kind="warnings") if warnings else ""
    used = {name for name, _ in ladder.fitted.values()} if ladder else set()
    sources = [f"{name}: {law.source}." for name, law in laws.items() if name not in used]
    return Section("laws", "The laws", body + bullets(sources))


def _certainty(name: str, law: LawFit) -> str:
    """The rows beside the law, profiles, fits with a run left out, other defensible fits, and residuals of one law."""
    body = _against_rows(name, law) if law.rows is not None else ""
    if law.profiles:
        rows: list[list[object]] = [
            [
                key,
                significant(law.params[key]),
                known(law.intervals()[key], lambda ends: span(*ends)),
                " to ".join(known(end, significant) if end is not None else "no limit" for end in ends),
                known(law.left_out.get(key), lambda ends: span(*ends)),
            ]
            for key, ends in law.profiles.items()
        ]
        header = "parameter|value|bootstrap|profile of the objective|range without any one run"
        body += data_table(f"How sure: {name}", "lrrrr", header, rows)
        body += plot(
            profile_figure(law),
            f"profile-{slug(name)}",
            f"{name}: twice the scaled excess of the objective; 3.84 is 95%",
        )
    if law.sensitivity:
        shown_ahead = format_count if law.predicts == "N" else lambda value: significant(value, 5)
        names = [key for key in law.params if key not in law.fixed and "[" not in key][:6]
        rows = [
            [item.change, item.n, *(significant(item.params.get(key)) for key in names), known(item.ahead, shown_ahead),
             significant(item.optimum, 3), item.refused or ""]
            for item in law.sensitivity
        ]  # fmt: skip
        ahead = "best size" if law.predicts == "N" else "loss"
        header = f"fitted otherwise|rows|{'|'.join(names)}|{ahead} at 10 x the compute|optimal D/N|refused"
        body += data_table(f"Sensitivity: {name}", "l" + "r" * (len(names) + 3) + "l", header, rows)
    if law.residuals is not None:
        shape = law.residuals
        rows = [
            [key, f"{rho:+.2f}", significant(shape.p_values[key], 2), f"{shape.curvature.get(key, 0.0):+.1f}"]
            for key, rho in shape.rank_correlation.items()
        ]
        header = "residuals against|rank correlation|p|t of a bend"
        body += data_table(f"Residuals: {name}", "lrrr", header, rows)
        worst = ", ".join(f"{value:+.2%}" for _, value in shape.worst)
        body += paragraph(
            f"Largest residuals {worst}; excess kurtosis {shape.kurtosis:.1f}; correlation within runs "
            f"{shape.run_correlation:.2f}.",
            kind="note",
        )
    return body


def _against_rows(name: str, law: LawFit) -> str:
    """The rows and the law in one drawing, and what is left between them."""
    assert law.rows is not None
    shown = len(law.rows.measured)
    what = "best sizes" if law.predicts == "N" else "rows"
    which = f"{shown} {what}"
    if shown < law.rows.total:
        which = f"{shown} of {law.rows.total:,} {what}, evenly spaced in the prediction, and the largest residuals"
    body = f"<h3>{escape(name)} and its {what}</h3>"
    figure = fit_figure(law)
    drawn = "; lines are the law" if any(trace.mode == "lines" for trace in figure.data) else ""
    body += plot(figure, f"fit-{slug(name)}", f"{name}: {which}{drawn}")
    band = "; dashed, where 95% of single runs should lie" if law.residual_sd is not None else ""
    own = "; grey, the law's own 95% interval" if law.draws is not None and law.predicts == "loss" else ""
    return body + plot(
        residual_figure(law), f"residuals-{slug(name)}", f"{name}: measured over law, less one{own}{band}"
    )


def _parameter(law: LawFit, name: str) -> Html:
    value = f"<b>{significant(law.params[name], 4)}</b>"
    interval = law.intervals()[name]
    none = "at its bound" if name in law.at_bound else "no interval"
    below = "held" if name in law.fixed else none if interval is None else span(*interval)
    return Html(f"{value}<br><small>{below}</small>")


def _objective(law: LawFit) -> str:
    names = {
        "huber": "Huber of log residuals",
        "lad": "absolute log residuals",
        "ols": "squared log residuals",
        "ols_raw": "squared residuals",
    }
    delta = f", \u03b4 = {law.delta:g}" if law.delta is not None else ""
    return known(law.objective, lambda key: names.get(key, key) + delta)


def _range(law: LawFit, name: str, shown: Callable[[Any], str]) -> str:
    return span(*law.ranges[name], shown) if name in law.ranges else NONE
