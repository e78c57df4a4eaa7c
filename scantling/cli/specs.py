"""The verbs of a specification: check, cost and init."""

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from scantling.cli.app import Json, Set, app, print_json
from scantling.errors import InputError


@app.command
def check(spec: Path, *, set_: Set = (), json_: Json = False) -> None:
    """Load a spec, resolve its short forms, and print the explicit layers.

    Args:
        spec: A spec YAML, a run YAML with a model section, or a Hugging Face config.json.
    """
    from scantling.resolve import load_spec, to_yaml

    model = load_spec(spec, set_)
    if json_:
        print_json({"hash": model.hash, **model.model_dump(mode="json")})
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
        print_json({**found[0], **shared} if len(found) == 1 else {"models": found, **shared})
    else:
        show.cost_tables(costs, memories, times, train_batch, checkpointing)


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
