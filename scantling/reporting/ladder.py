"""The runs: the ladder of losses against compute with the laws that belong to it, what was run, and what was matched."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from scantling.costing import total
from scantling.errors import InputError
from scantling.laws import LawFit
from scantling.laws.rows import levels, usable_rows
from scantling.record import RunRecord, to_frame
from scantling.reporting import figures
from scantling.reporting.markup import Section, bullets, data_table, known, paragraph, plot, spread
from scantling.reporting.sources import Sources, counted, dig
from scantling.resolve import spec_from
from scantling.rows import rows

UNLABELLED = "runs without a family"


@dataclass(frozen=True, eq=False)
class Ladder:
    """Runs as a table, each family's law and style.

    Attributes:
        table: `record.to_frame` of all runs.
        fitted: the law of each family that has one.
        doubts: what keeps a law from belonging to the runs shown.
    """

    table: pd.DataFrame
    fitted: dict[str, tuple[str, LawFit]]
    looks: dict[str, figures.Style]
    doubts: list[str]

    @property
    def done(self) -> pd.DataFrame:
        """The finished runs."""
        return self.table[(self.table.status == "done") & self.table.loss.notna()]


def ladder_of(sources: Sources) -> Ladder | None:
    """The runs with the laws that belong to them: by fingerprint of the rows fitted, else by the family's name."""
    if not sources.records:
        return None
    counts = {counted(law) for law in sources.laws.values()}
    table = to_frame(sources.records, "non_embedding" if counts == {"non_embedding"} else "total")
    table["family"] = [str(record.labels.get("family", UNLABELLED)) for _, record in sources.records]
    table["loss"] = table.loss.astype(float)
    doubts = _add_spec_columns(table, [record for _, record in sources.records])
    families = list(dict.fromkeys(table.family))
    order = {item.baseline: 0 for item in sources.savings}
    families.sort(key=lambda name: order.get(name, 1))
    made = Ladder(table, {}, figures.styles(families), doubts)
    whole = _fingerprint(made.done)
    for family in families:
        own = _fingerprint(made.done[made.done.family == family])
        exact = [
            (name, law)
            for name, law in sources.laws.items()
            if law.fingerprint is not None and law.fingerprint in (own, whole)
        ]
        named = [(family, sources.laws[family])] if family in sources.laws else []
        only = list(sources.laws.items()) if len(families) == len(sources.laws) == 1 else []
        if chosen := (exact or named or only)[:1]:
            made.fitted[family] = chosen[0]
            if not exact:
                made.doubts.append(
                    f"The law {chosen[0][0]} was fitted to other rows than the runs of {family} shown (fingerprints differ)."
                )
    return made


def _add_spec_columns(table: pd.DataFrame, records: Sequence[RunRecord]) -> list[str]:
    """Columns `kv` (cached values per token) and `rate` (peak learning rate); what is wrong with the specs recorded."""
    kv: dict[str, float] = {}
    doubts = []
    for record in records:
        if record.spec_hash in kv or not isinstance(record.config.get("model"), dict):
            continue
        try:
            spec = spec_from(record.config["model"], record.name)
        except InputError as error:
            doubts.append(f"The model in the record of {record.name} cannot be read: {error.faults[0]}.")
            continue
        kv[record.spec_hash] = float(total(rows(spec), "kv_elements"))
        if spec.hash != record.spec_hash:
            doubts.append(
                f"The model in the record of {record.name} has another spec hash ({spec.hash[:12]}) than recorded."
            )
    table["kv"] = [kv.get(record.spec_hash, math.nan) for record in records]
    table["rate"] = [float(dig(record.config, "train", "optimizer", "learning_rate") or math.nan) for record in records]
    return doubts


def _fingerprint(table: pd.DataFrame) -> str:
    try:
        return usable_rows(table, {"N": "N", "D": "D"}, loss="loss")[0].fingerprint
    except InputError:
        return ""


# --- the section -------------------------------------------------------------------------------------------------------


def ladder_section(ladder: Ladder, sources: Sources) -> Section:
    """Loss against compute, one panel per path, with the facts a reader needs to believe it."""
    done = ladder.done
    body = [_what_was_run(ladder, sources)]
    if len(done) >= 2:
        laws = {family: law for family, (_, law) in ladder.fitted.items()}
        keys = "".join(f"<li>{figures.marker_svg(look)}{escape(name)}</li>" for name, look in ladder.looks.items())
        worst = max([0.001, *(_worst_residual(done[done.family == family], law) for family, law in laws.items())])
        body.append(f'<ul class="legend" aria-label="families">{keys}</ul>')
        pad = 0.06 * max(float(done.loss.max() - done.loss.min()), 0.02)
        lowest = float(done.loss.min()) - pad
        panels = _panels(done)
        lines = [
            figures.curve(rows_, laws[str(name)])
            for _, part in panels
            for name, rows_ in part.groupby("family")
            if str(name) in laws
        ]
        lowest = min([lowest, *(float(line.loss.min()) - pad for line in lines if line is not None)])
        drawn = [
            plot(
                figures.ladder(part, laws, ladder.looks, (lowest, float(done.loss.max()) + pad), worst),
                f"ladder-{number}",
                title,
            )
            for number, (title, part) in enumerate(panels)
        ]
        body.append(f'<div class="panels" data-panels="{min(len(drawn), 3)}">{"".join(drawn)}</div>')
        if laws:
            body.append(
                paragraph(
                    "Points are runs; point at one for its name, sizes and hash. Curves are the fitted laws along the runs'",
                    "own N and D, shaded with the 95% interval of the law from its bootstrap draws (a single run scatters",
                    f"around it by the residual sd). Dashed parts extrapolate, to {figures.EXTRAPOLATION:g} times the largest",
                    "compute measured. A residual is measured over predicted loss, less one.",
                    kind="note",
                )
            )
        body.append(bullets(ladder.doubts, kind="warnings"))
    body.append(_what_was_matched(ladder))
    return Section("ladder", "Loss against training compute", "".join(body))


def _worst_residual(points: pd.DataFrame, law: LawFit) -> float:
    fitted = law.predict(points.N.to_numpy(float), points.D.to_numpy(float)).value
    return float(abs(points.loss.to_numpy(float) / fitted - 1).max())


def _panels(done: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """One table per value of tokens per parameter that has two budgets; the other runs together."""
    codes = pd.Series(levels(done.tokens_per_parameter.to_numpy(float), 1.1), index=done.index)
    found, left = [], []
    for code in sorted(set(codes)):
        part = done[codes == code]
        if part.groupby("family").C.nunique().max() >= 2:
            found.append((f"{part.tokens_per_parameter.astype(float).mean():.3g} tokens per parameter", part))
        else:
            left.append(part)
    return found + ([("Runs that share no path of two budgets", pd.concat(left))] if left else [])


def _what_was_run(ladder: Ladder, sources: Sources) -> str:
    """The facts a reader needs before believing a curve, each only once where all runs agree."""
    records = [record for _, record in sources.records]

    def said(*keys: str) -> str:
        values = sorted({json.dumps(dig(record.config, *keys), sort_keys=True, default=str) for record in records})
        plain = (json.loads(text) for text in values)
        shown = [" ".join(map(str, value)) if isinstance(value, list) else known(value) for value in plain]
        return ", ".join(shown[:6]) + (" \u2026" if len(shown) > 6 else "")

    rates = [dig(record.config, "train", "optimizer", "learning_rate") for record in records]
    rate = spread(rates, lambda value: f"{value:.3g}")
    noise = spread((record.final.get("validation_std_error") for record in records), lambda value: f"{value:.4f}")
    planned = dict.fromkeys(f"{value:.3g}" for value in sorted(ladder.table.tokens_per_parameter.astype(float)))
    epochs = spread((record.data.get("epochs") for record in records), lambda value: f"{value:.2f}")
    facts = {
        "Families": ", ".join(f"{name} ({int((ladder.done.family == name).sum())})" for name in ladder.looks),
        "Parameters (total)": spread(record.params.get("total") for record in records),
        "Tokens": f"{spread(record.tokens for record in records)}; the training text seen {epochs} times",
        "Tokens per parameter": ", ".join(list(planned)[:12]),
        "Seeds": ", ".join(map(str, sorted({record.seed for record in records}))),
        "Data": f"{said('data', 'source')}; tokenizer {said('data', 'tokenizer')}; losses in nats per token of it",
        "Validation": f"final checkpoint, sampling error of the split {noise} nats",
        "Optimizer": f"{said('train', 'optimizer', 'kind')}, peak rate {rate}, schedule {said('train', 'schedule', 'kind')}",
        "Batch": f"{said('train', 'batch_tokens')} tokens per step, sequences of {said('train', 'sequence_length')}",
        "Compute": "3 \u00d7 forward FLOPs as performed, full attention, output head included",
    }  # fmt: skip
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()) + "</dl>"


def _what_was_matched(ladder: Ladder) -> str:
    """Candidate over baseline within each cell: the range of ratios of what a comparison should hold equal."""
    families = list(ladder.looks)
    measures = {
        "N": "parameters N",
        "D": "tokens D",
        "C": "training FLOPs",
        "kv": "KV cache per token",
        "rate": "peak learning rate",
    }
    cells_of = {
        name: ladder.done[ladder.done.family == name].drop_duplicates("cell").set_index("cell")[list(measures)]
        for name in families
    }
    body = []
    for name in families[1:]:
        ratios = (cells_of[name] / cells_of[families[0]]).dropna(how="all")
        if len(ratios):
            body.append(
                (f"{name} / {families[0]}", len(ratios), *(_ratio(ratios[measure].dropna()) for measure in measures))
            )
    if not body:
        return ""
    note = "Ratios within cells of the same size, tokens per parameter and seed; 1 means matched."
    tuned = "The families of a cell had the same peak learning rate; it was not tuned for each."
    rule = tuned if all(row[-1] == "1" for row in body) else ""
    return data_table("What was matched", "lrrrrrr", ("families", "cells", *measures.values()), body) + paragraph(
        note, rule, kind="note"
    )


def _ratio(values: "pd.Series[float]") -> str:
    return "1" if len(values) and (values - 1).abs().max() < 5e-7 else spread(values, "{:.3f}".format)
