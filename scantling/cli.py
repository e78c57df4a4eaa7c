"""The command line: thin verbs over the library. Exit 0 done; 2 the input is wrong; 1 it failed while running.

Each verb imports what it needs when it runs, so that sizing, predicting and planning never load torch.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter

from scantling import __version__
from scantling.errors import InputError, ScantlingError, suggest

if TYPE_CHECKING:
    from scantling.config import RunConfig

app = App(
    name="scantling",
    help="Size every part of a decoder-only language model: cost, train, study, fit, predict, plan, report.",
    version=__version__,
    help_format="plaintext",
)

Set = Annotated[
    tuple[str, ...],
    Parameter(name="--set", negative=(), help="Override a key of the file: dotted.key=value. Repeatable."),
]
Json = Annotated[bool, Parameter(name="--json", negative=(), help="One JSON object on stdout instead of tables.")]


@app.command
def check(spec: Path, *, set_: Set = (), json_: Json = False) -> None:
    """Load a spec, resolve its short forms, and print the explicit layers.

    Args:
        spec: A spec YAML, a run YAML with a model section, or a Hugging Face config.json.
    """
    from scantling.resolve import load_spec, to_yaml

    model = load_spec(spec, set_)
    if json_:
        _print({"hash": model.hash, **model.model_dump(mode="json")})
    else:
        print(f"# hash {model.hash}\n{to_yaml(model)}", end="")


@app.command
def cost(
    spec: Annotated[list[Path], Parameter(negative=())],
    *,
    context: int | None = None,
    batch: int = 1,
    dtype: str = "bf16",
    device: str | None = None,
    hardware: Path | None = None,
    train_batch: int = 1,
    checkpointing: Annotated[bool, Parameter(negative=())] = False,
    set_: Set = (),
    json_: Json = False,
) -> None:
    """The exact cost of one model, or of several side by side.

    Args:
        spec: One or more specs.
        context: Tokens that one token attends to; default the spec's max_position_embeddings.
        batch: Sequences served together; the KV cache grows with it.
        dtype: Of weights and cache: fp32, bf16, fp16, fp8, int8.
        device: Add seconds and money on this device, such as h100-sxm.
        hardware: A YAML of devices merged over the built-in table.
        train_batch: Sequences of one training micro-batch, for training memory and speed.
        checkpointing: Training keeps layer inputs only and recomputes the rest.
    """
    from scantling import show
    from scantling.costing import CONVENTIONS
    from scantling.costing import cost as price
    from scantling.memory import training_memory
    from scantling.resolve import load_spec
    from scantling.units import dtype_bytes

    if batch < 1 or (context is not None and context < 1):
        raise InputError(f"--context and --batch: expected at least 1, got {context} and {batch}")
    if train_batch < 1:
        raise InputError(f"--train-batch: expected at least 1, got {train_batch}")
    if hardware is not None and device is None:
        raise InputError("--hardware: give --device too, a device of that file")
    size = dtype_bytes(dtype)
    models = [(str(path), load_spec(path, set_)) for path in spec]
    costs = [(name, model, price(model, context, batch, size)) for name, model in models]
    memories = [
        training_memory(
            model, item.context, train_batch, activation_bytes=4 if size == 4 else 2, checkpointing=checkpointing
        )
        for _, model, item in costs
    ]
    times: list[dict[str, Any]] = [{} for _ in costs]
    if device is not None:
        from scantling.hardware import find_device, load_hardware, priced

        chosen = find_device(device, load_hardware(hardware))
        times = [
            {
                "device": device,
                **priced(item, held.state, held.kept, train_batch * item.context, chosen, dtype, checkpointing),
            }
            for (_, _, item), held in zip(costs, memories, strict=True)
        ]
    if json_:
        found = [
            {
                "spec": name, "hash": model.hash, **show.cost_json(model, item), "dtype": dtype,
                "training_memory": show.memory_json(memory, train_batch, checkpointing), **time,
            }
            for (name, model, item), memory, time in zip(costs, memories, times, strict=True)
        ]  # fmt: skip
        shared: dict[str, Any] = {"conventions": CONVENTIONS}
        if device is not None:
            from scantling.hardware import CONVENTIONS as TIME_CONVENTIONS

            shared["device_conventions"] = TIME_CONVENTIONS
        _print({**found[0], **shared} if len(found) == 1 else {"models": found, **shared})
    else:
        show.cost_tables(costs, memories, times, train_batch, checkpointing)


@app.command
def train(
    run: Path,
    *,
    out: Path | None = None,
    coord_check: Annotated[bool, Parameter(negative=())] = False,
    profile: Annotated[bool, Parameter(negative=())] = False,
    deadline: str | None = None,
    set_: Set = (),
    json_: Json = False,
) -> None:
    """Train one run; the same command goes on after an interruption, and says so when it is done.

    Args:
        run: The run YAML.
        out: The run folder; default runs/<name>.
        coord_check: Train nothing for good: a few steps at 1, 2, 4 and 8 times the run's widths, to see whether activations
            grow with width (muP's coordinate check); coordinates.html is written to the run folder.
        profile: Take a few steps that do not count and say where their time goes.
        deadline: Save and stop after this time (90s, 45m, 2h30m), to be gone on with by the same command.
    """
    from scantling.config import load_run
    from scantling.units import parse_duration

    config = load_run(run, set_)
    if coord_check:
        return _coordinates(config, out or Path("runs") / config.name, json_)
    from scantling import training

    if profile:
        found = training.profile(config)
        return _print(found.to_json()) if json_ else print("\n".join(found.sentences()))
    folder = out or Path("runs") / config.name
    seconds = None if deadline is None else parse_duration(deadline, "--deadline")
    record = training.train(config, folder, deadline=seconds)
    if not training.speaks():
        return None
    if json_:
        _print(record.to_json())
    else:
        loss, bits = record.final["validation_loss"], record.final.get("bits_per_byte")
        per_byte = "" if bits is None else f" ({bits:.4f} bits/byte)"
        print(f"{folder}: {record.status}, validation loss {loss:.4f} nats/token{per_byte}, {record.tokens:,} tokens")


def _coordinates(config: "RunConfig", folder: Path, json_: bool) -> None:
    """The coordinate check of a run: a table or JSON, and a page in the run folder."""
    from scantling import show
    from scantling.coordinates import coordinate_check
    from scantling.data import prepare
    from scantling.files import write_text
    from scantling.reporting import coordinates_page

    found = coordinate_check(
        config, prepare(config.data), report=lambda line: print(line, file=sys.stderr, flush=True)
    ).to_json()
    write_text(folder / "coordinates.html", coordinates_page(found))
    if json_:
        _print(found)
    else:
        show.coordinates(found)
        print(f"{folder / 'coordinates.html'}: the activations by width", file=sys.stderr)


@app.command
def study(
    study: Path,
    *,
    out: Path | None = None,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    set_: Set = (),
    json_: Json = False,
) -> None:
    """Run a grid of runs as separate processes; finished ones are skipped, failures are recorded.

    Args:
        study: The study YAML.
        out: The study folder; default studies/<name>.
        dry_run: Print parameters, tokens, FLOPs and estimated minutes of every run, and run nothing.
    """
    from scantling import show
    from scantling import study as studies
    from scantling.config import load_study

    config = load_study(study, set_)
    folder = out or Path("studies") / config.name
    if dry_run:
        table = studies.dry_run(config, folder)
    else:
        table = studies.run_study(config, folder, report=lambda line: print(line, file=sys.stderr, flush=True))
    failed = [] if dry_run else [name for name, _ in studies.failures(folder)]
    if json_:
        _print({"study": config.name, "folder": str(folder), "runs": table.to_dict("records"), "failed": failed})
    else:
        show.run_table(table, dry_run=dry_run)
        for name in failed:
            print(f"failed: {name} (see {folder / 'runs' / name / studies.FAILURE_FILE})")


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
    rows, excluded = clean(rows, loss=loss, params=params, tokens=tokens, units=_pairs("--unit", unit))
    settings: dict[str, Any] = {
        "loss": loss, "params": params, "tokens": tokens, "clusters": clusters, "weights": weights,
        "conventions": conventions, "resamples": resamples, "seed": seed, "excluded": excluded,
        "also": {name: name for name in also_params},
    }  # fmt: skip
    chosen: dict[str, Any] = {
        "law": law, "columns": _pairs("--column", column), "objective": objective, "delta": delta, "tied": tied,
        "ties": _pairs("--tie", tie), "fixed": _numbers(fix), "bounds": _bounds(bound),
    }  # fmt: skip
    if compare is not None:
        comparison = compare_families(rows, compare, baseline, settings | chosen)
        if out is not None:
            write_json(out, comparison.to_json())
        _print(comparison.to_json()) if json_ else show.comparison(comparison)
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
    _print(show.law_json(law_fit)) if json_ else show.law(law_fit)


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
        at: Another quantity of the law, as width=1024 or heads=8,1. Repeatable.
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
    given = _pairs("--at", at)
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
    _print(answer) if json_ else show.prediction(law, answer)


@app.command
def plan(plan: Path, *, out: Path | None = None, set_: Set = (), json_: Json = False) -> None:
    """The cost-optimal shapes for a budget or a target loss, over training and inference.

    Args:
        plan: The plan YAML.
        out: Write the plan JSON here, and beside it YAML: the best shape, a study that tests the choice, the runs to do next.
    """
    from scantling import show
    from scantling.files import write_json, write_text
    from scantling.planning import load_plan
    from scantling.planning import plan as solve

    result = solve(load_plan(plan, set_))
    if out is not None:
        write_json(out, result.to_json())
        asked = {
            "best": result.candidates[0].yaml,
            "study": result.study,
            "next": result.next.study if result.next else None,
        }
        for name, text in asked.items():
            if text is not None:
                write_text(out.with_suffix(f".{name}.yaml"), text)
    _print(result.to_json()) if json_ else show.plan(result)


@app.command
def report(
    path: Annotated[list[Path], Parameter(negative=())], *, out: Path = Path("report.html"), json_: Json = False
) -> None:
    """One self-contained HTML page from studies, laws, comparisons, plans and specs.

    Args:
        path: Study or run folders, law / comparison / plan JSON files, spec YAML files.
        out: The page to write.
    """
    from scantling.reporting import report as write

    written = write(path, out)
    _print({"file": str(written), "bytes": written.stat().st_size}) if json_ else print(written)


@app.command
def generate(
    checkpoint: Path,
    *,
    prompt: str = "",
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    json_: Json = False,
) -> None:
    """Continue a prompt with a trained model.

    Args:
        checkpoint: A run folder, or one of its checkpoint folders.
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.
    """
    from scantling.generate import generate as continue_text

    text = continue_text(checkpoint, prompt, max_new_tokens, temperature, seed)
    _print({"prompt": prompt, "text": text}) if json_ else print(prompt + text)


@app.command
def evaluate(checkpoint: Path, *, tokens: str = "1M", json_: Json = False) -> None:
    """Validation loss and bits per byte of a trained model on its run's validation split.

    Args:
        checkpoint: A run folder, or one of its checkpoint folders.
        tokens: At most this many tokens.
    """
    from scantling.generate import evaluate_checkpoint
    from scantling.units import parse_count

    found = evaluate_checkpoint(checkpoint, int(parse_count(tokens, "--tokens")))
    if json_:
        _print(found)
    else:
        per_byte = f"{found['bits_per_byte']:.4f} bits/byte, " if "bits_per_byte" in found else ""
        print(f"validation loss {found['validation_loss']:.4f} ± {found['validation_std_error']:.4f} nats/token, "
              f"{per_byte}{found['validation_tokens']:,.0f} tokens")  # fmt: skip


@app.command
def init(name: Literal["spec", "run", "study", "plan"], *, out: Path | None = None) -> None:
    """Write a commented example YAML.

    Args:
        name: Which kind.
        out: The file; default <name>.yaml. An existing file is never overwritten.
    """
    from importlib.resources import files

    target = out or Path(f"{name}.yaml")
    if target.exists():
        raise InputError(f"{target}: exists already; choose another --out")
    from scantling.files import write_text

    write_text(target, (files("scantling") / "templates" / f"{name}.yaml").read_text(encoding="utf-8"))
    print(target)


def _numbers(pairs: tuple[str, ...]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            raise InputError(f"--fix {pair}: expected name=number, such as --fix E=1.69") from None
        if not equals:
            raise InputError(f"--fix {pair}: expected name=number, such as --fix E=1.69")
    return found


def _pairs(option: str, pairs: tuple[str, ...]) -> dict[str, str]:
    """`name=value` options."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise InputError(f"{option} {pair}: expected name=value")
        found[name.strip()] = value.strip()
    return found


def _bounds(pairs: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """`name=low:high` options; an empty end is zero or infinite."""
    found = {}
    for name, value in _pairs("--bound", pairs).items():
        low, colon, high = value.partition(":")
        try:
            found[name] = (float(low or 0.0), float(high or "inf"))
        except ValueError:
            colon = ""
        if not colon:
            raise InputError(f"--bound {name}={value}: expected name=low:high, such as --bound alpha=0.2:0.5")
    return found


def _print(value: Any) -> None:
    json.dump(value, sys.stdout, indent=1, default=_plain, allow_nan=False, ensure_ascii=False)
    print()


def _plain(value: Any) -> Any:
    """NumPy scalars and paths as JSON knows them."""
    return value.item() if hasattr(value, "item") else str(value)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        _fail(str(error), 2)
    except ScantlingError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 1)
    except BrokenPipeError:
        os._exit(0)
    except Exception as error:
        if debug:
            raise
        _fail(f"internal error: {type(error).__name__}: {error}; run again with --debug for the traceback", 1)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
