"""The verbs of runs and what they leave: train, study, generate and evaluate."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scantling.cli.app import Json, Set, app, print_json

if TYPE_CHECKING:
    from scantling.config import RunConfig


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
        return print_json(found.to_json()) if json_ else print("\n".join(found.sentences()))
    folder = out or Path("runs") / config.name
    seconds = None if deadline is None else parse_duration(deadline, "--deadline")
    record = training.train(config, folder, deadline=seconds)
    if not training.speaks():
        return None
    if json_:
        print_json(record.to_json())
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
        print_json(found)
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
        print_json({"study": config.name, "folder": str(folder), "runs": table.to_dict("records"), "failed": failed})
    else:
        show.run_table(table, dry_run=dry_run)
        for name in failed:
            print(f"failed: {name} (see {folder / 'runs' / name / studies.FAILURE_FILE})")


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
        checkpoint: A run folder, one of its checkpoint folders, or an imported checkpoint.
        prompt: The text to continue.
        max_new_tokens: Tokens to add.
        temperature: 0 takes the likeliest token.
        seed: Of the sampling.
    """
    from scantling.generate import generate as continue_text

    text = continue_text(checkpoint, prompt, max_new_tokens, temperature, seed)
    print_json({"prompt": prompt, "text": text}) if json_ else print(prompt + text)


@app.command
def evaluate(checkpoint: Path, *, tokens: str = "1M", data: Path | None = None, json_: Json = False) -> None:
    """Validation loss and bits per byte of a trained model on its run's validation split.

    Args:
        checkpoint: A run folder, one of its checkpoint folders, or an imported checkpoint.
        tokens: At most this many tokens.
        data: For an imported checkpoint: a text file or folder, of which the part counts that a run would hold out.
    """
    from scantling.generate import evaluate_checkpoint
    from scantling.units import parse_count

    found = evaluate_checkpoint(checkpoint, int(parse_count(tokens, "--tokens")), data)
    if json_:
        print_json(found)
    else:
        per_byte = f"{found['bits_per_byte']:.4f} bits/byte, " if "bits_per_byte" in found else ""
        print(f"validation loss {found['validation_loss']:.4f} ± {found['validation_std_error']:.4f} nats/token, "
              f"{per_byte}{found['validation_tokens']:,.0f} tokens")  # fmt: skip
