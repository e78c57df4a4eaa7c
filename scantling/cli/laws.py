"""The verbs of scaling laws: fit and predict."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from scantling.cli.app import Json, app, bounds, numbers, pairs, print_json
from scantling.errors import InputError, suggest


@app.command
def fit(
    table: Path,
    *,
    law: str = "chinchilla",
    loss: str = "loss",
    params: str = "N",
    tokens: str = "D",
    column: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    clusters: str | None = None,
    weights: str | None = None,
    objective: Literal["huber", "lad", "ols", "ols_raw"] = "huber",
    delta: float = 1e-3,
    tied: Annotated[bool, Parameter(negative=())] = False,
    tie: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    fix: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    bound: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    extrapolate: Annotated[bool, Parameter(negative=())] = False,
    only: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    unit: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    separator: str | None = None,
    also_params: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    error: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    compare: str | None = None,
    baseline: str | None = None,
    count: Literal["total", "non_embedding"] = "total",
    resamples: int = 1000,
    seed: int = 0,
    out: Path | None = None,
    json_: Json = False,
) -> None:
    """Fit a scaling law with uncertainty, or compare families by the FLOPs they need for the same loss.

    Args:
        table: A .csv, .tsv, .jsonl or .parquet table of runs, or a study folder.
        law: A name (chinchilla, overtraining, frontier, kaplan, isoflop, envelope, width-depth, head-configurations, ...) or an
            equation such as "E + A*width^-a + B*D^-b"; docs/fitting.md lists them.
        loss: Column of losses, nats per token.
        params: Column of parameter counts.
        tokens: Column of training tokens.
        column: Column of another quantity of the law, as width=d_model. Repeatable.
        clusters: Column naming the run of each row, when rows are checkpoints.
        weights: Column of weights.
        objective: Of log residuals: huber, ols (squares), lad (absolute); ols_raw: squares of the raw loss.
        delta: Huber's delta.
        tied: Impose equal exponents for parameters and tokens.
        tie: Make one parameter copy another, as beta=alpha. Repeatable.
        fix: Hold a parameter, as E=1.69. Repeatable.
        bound: Keep a parameter within bounds, as alpha=0.2:0.5. Repeatable.
        extrapolate: Choose rows, law and objective by the pre-registered extrapolation rule (docs/fitting.md).
        only: Keep only rows with column=value. Repeatable.
        unit: Unit of a column: N=M, D=B, loss=bits, loss=perplexity. Repeatable.
        separator: Between the entries of a table; default a comma in .csv, a tab in .tsv.
        also_params: Another column of parameter counts, for the sensitivity table. Repeatable.
        error: Column of task errors: a law from loss to it goes with the law of loss. Repeatable.
        compare: Column of families: fit each, and the loss-matched saving between them.
        baseline: The family that the others are compared with; default the first.
        count: For a study folder: the parameters that N counts.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.
        out: Write the law (or the comparison) to this JSON file.
    """
    from scantling import show
    from scantling.compare import compare_families, read_rows, select
    from scantling.files import write_json
    from scantling.laws import clean, with_errors
    from scantling.laws import extrapolate as fit_ahead
    from scantling.laws import fit as fit_law

    rows, conventions = read_rows(table, count, separator)
    rows = select(rows, only)
    rows, excluded = clean(rows, loss=loss, params=params, tokens=tokens, units=pairs("--unit", unit))
    settings: dict[str, Any] = {
        "loss": loss, "params": params, "tokens": tokens, "clusters": clusters, "weights": weights,
        "conventions": conventions, "resamples": resamples, "seed": seed, "excluded": excluded,
        "also": {name: name for name in also_params},
    }  # fmt: skip
    chosen: dict[str, Any] = {
        "law": law, "columns": pairs("--column", column), "objective": objective, "delta": delta, "tied": tied,
        "ties": pairs("--tie", tie), "fixed": numbers("--fix", fix), "bounds": bounds("--bound", bound),
    }  # fmt: skip
    if compare is not None:
        comparison = compare_families(rows, compare, baseline, settings | chosen)
        if out is not None:
            write_json(out, comparison.to_json())
        print_json(comparison.to_json()) if json_ else show.comparison(comparison)
        return
    if extrapolate:
        plain = {"law": "chinchilla", "objective": "huber", "delta": 1e-3, "tied": False}
        given = [name for name, value in chosen.items() if value != plain.get(name, {})]
        if given:
            raise InputError(f"--extrapolate chooses {', '.join(given)} itself; leave the option out")
        law_fit = fit_ahead(rows, **settings)
    else:
        law_fit = fit_law(rows, **settings, **chosen)
    law_fit = with_errors(law_fit, rows, loss, error)
    if out is not None:
        write_json(out, law_fit.to_json())
    print_json(show.law_json(law_fit)) if json_ else show.law(law_fit)


@app.command
def predict(
    law: str,
    *,
    params: str | None = None,
    tokens: str | None = None,
    compute: str | None = None,
    at: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    level: float = 0.95,
    json_: Json = False,
) -> None:
    """The loss a law predicts, with its interval.

    Args:
        law: A published name (chinchilla-epoch, overtrain-c4, ...) or a law JSON written by fit.
        params: Parameters, as 70e9 or 70B, counted as the law counts them.
        tokens: Training tokens, as 1.4e12 or 1.4T.
        compute: Instead of both: training FLOPs C = 6 N D, spent optimally.
        at: Another quantity of the law, as width=1024 or heads=8,1; loss=2.5 alone asks for the task errors there. Repeatable.
        level: Of the interval.
    """
    from scantling import show
    from scantling.laws import load_law
    from scantling.units import parse_count

    found = load_law(law)
    if not 0 < level < 1:
        raise InputError(f"--level: expected a number between 0 and 1, got {level}")
    known = ("N", "D", "C", "M")
    wanted = [name for name in (*found.formula.columns, *found.groups) if name not in known]
    given = pairs("--at", at)
    if set(given) == {"loss"} and found.downstream and params is tokens is compute is None:
        answer = show.errors_json(found, parse_count(given["loss"], "--at loss"), level)
        print_json(answer) if json_ else show.prediction(law, answer)
        return
    for name in given:
        if name not in (*found.formula.columns, *found.groups, *known):
            near = suggest(name, (*found.formula.columns, *found.groups))
            raise InputError(f"--at {name}: the law {found.formula.text!r} has no such quantity{near}")
    if compute is not None and not given and "C" not in found.formula.columns[:1]:
        if params is not None or tokens is not None:
            raise InputError("--compute stands for the optimal --params and --tokens; give either it or those")
        answer = show.optimum_json(found, parse_count(compute, "--compute"), level)
    elif given or wanted or found.law not in ("chinchilla", "overtraining"):
        numbers = {"N": params, "D": tokens, "C": compute} | {k: v for k, v in given.items() if k not in found.groups}
        columns = {name: parse_count(value, f"--at {name}") for name, value in numbers.items() if value is not None}
        groups = {name: value for name, value in given.items() if name in found.groups}
        answer = show.value_json(found, columns, groups, level)
    elif params is None or tokens is None:
        raise InputError("predict needs --params and --tokens, or --compute")
    else:
        answer = show.prediction_json(found, parse_count(params, "--params"), parse_count(tokens, "--tokens"), level)
    print_json(answer) if json_ else show.prediction(law, answer)
