"""The verb of growth timing."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scantling.cli.app import Json, app, print_json


@app.command
def grow_when(
    *,
    law: Annotated[tuple[str, ...], Parameter(negative=())],
    from_: Annotated[Path, Parameter(name="--from")],
    to: Annotated[tuple[Path, ...], Parameter(negative=())],
    tokens: str,
    paid: str | None = None,
    context: int | None = None,
    count: Literal["total", "non_embedding", "matmul_non_embedding", "active"] | None = None,
    json_: Json = False,
) -> None:
    """When to grow one model into a larger one, what that saves, and what a checkpoint already trained is worth.

    Args:
        law: A published name or a law JSON written by fit; one, or one for each shape (--from first). Repeatable.
        from_: The smallest spec.
        to: The target; repeated: larger and larger ones, the last the target, the others used where they help.
        tokens: That the target would be trained on from scratch; they set the loss to reach.
        paid: Tokens that a checkpoint of --from was trained on already.
        context: Sequence length of training; default the target's max_position_embeddings.
        count: The parameters that N counts; default as the law says.
    """
    from scantling import show
    from scantling.errors import InputError
    from scantling.laws import load_law
    from scantling.planning.growing import shapes_of, timing
    from scantling.resolve import load_spec
    from scantling.units import parse_count

    if context is not None and context < 1:
        raise InputError(f"--context: expected at least 1, got {context}")
    laws = [(name, load_law(name)) for name in law]
    specs = [(str(path), load_spec(path)) for path in (from_, *to)]
    if len(laws) not in (1, len(specs)):
        raise InputError(f"--law: expected one, or one for each of the {len(specs)} specs, got {len(laws)}")
    shapes = shapes_of(specs, [fit for _, fit in laws], count, context)
    already = None if paid is None else parse_count(paid, "--paid")
    found = timing(laws, shapes, parse_count(tokens, "--tokens"), already)
    print_json(found.to_json()) if json_ else show.timing(found)
