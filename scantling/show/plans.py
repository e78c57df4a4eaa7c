"""Plans: the ranked shapes, the best one in words, and what to run next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scantling.show.tables import console, empty_table
from scantling.units import format_bytes, format_count, format_flops

if TYPE_CHECKING:  # pandas and scipy take longer to load than a cost takes to print
    from scantling.planning import Plan


def plan(found: Plan) -> None:
    """Ranked candidates, the best one in words, and the notes."""
    columns = (
        "shape",
        "heads",
        "parameters",
        "tokens",
        "loss",
        "training",
        "serving",
        "memory",
        found.minimize,
        "margin",
        *(["best"] if found.no_probability is None else []),
    )
    screened = (
        f"{len(found.candidates)} best of {found.screened:,} shapes"
        if found.screened
        else f"{len(found.candidates)} shapes"
    )
    table = empty_table(f"{screened}, least {found.minimize} first", "", *columns)
    for rank, item in enumerate(found.candidates, 1):
        interval = (
            "" if item.loss_low is None or item.loss_high is None else f" ({item.loss_low:.3f}-{item.loss_high:.3f})"
        )
        table.add_row(
            f"{rank}",
            f"{item.num_hidden_layers:.6g} x {item.hidden_size:.6g}" + (f" {item.family}" if item.family else ""),
            f"{item.num_attention_heads:g}/{item.num_key_value_heads:g} x {item.head_dim:g}",
            format_count(item.parameters, 4),
            format_count(item.tokens, 4),
            f"{item.loss:.4f}{interval}{' *' if item.extrapolated else ''}",
            format_flops(item.training_flops),
            format_flops(item.serving_flops) if item.serving_flops else "-",
            format_bytes(item.memory_bytes),
            f"{item.objective:.6g}",
            "-" if item.margin_percent is None else f"{item.margin_percent:.2f} %",
            *([] if item.probability_best is None else [f"{100 * item.probability_best:.0f} %"]),
        )
    console.print(table)
    best = found.candidates[0]
    console.print(f"binding: {best.binding}")
    _plan_costs(found)
    if any(item.extrapolated for item in found.candidates):
        console.print("* outside the range the law was fitted to")
    for note in found.notes:
        console.print(f"note: {note}")
    if best.yaml is not None:
        console.print(f"\n# the best shape, hash {best.hash}\n{best.yaml}", end="")


def _plan_costs(found: Plan) -> None:
    """The best candidate's costs, how the choice moves with the plan's numbers, and the runs to do next."""
    best, units = found.candidates[0], {"flops": format_flops, "bytes": format_bytes}
    said = [
        f"{name} {units.get(name.rpartition('_')[2], lambda value: f'{value:.5g}')(value)}"
        for name, value in {**best.costs, **(best.errors or {})}.items()
    ]
    console.print(f"the best: {', '.join(said)}")
    for turn in found.sensitivity:
        shape = f"{turn.num_hidden_layers:.6g} x {turn.hidden_size:.6g}"
        shape += f", heads {turn.num_attention_heads:g}/{turn.num_key_value_heads:g}"
        worse = "impossible" if turn.regret_percent is None else f"{turn.regret_percent:.2g} % worse"
        console.print(f"at {turn.factor:g} x {turn.key}: {shape}; this choice is {worse}")
    if (runs := found.next) is not None and not runs.runs:
        console.print("next: no runs of this budget are expected to change the choice for the better; keep it")
    elif runs is not None:
        now, after = (f"{value:.4g}" for value in (runs.expected_regret, runs.expected_regret_after))
        spent = f"{len(runs.runs)} runs of {format_flops(runs.training_flops)} together"
        console.print(
            f"next: {spent} lower the expected regret from {now} to {after} ({found.minimize}); --out writes them"
        )
