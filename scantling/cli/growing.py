"""The verb of growth."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from scantling.cli.app import Json, app, print_json


@app.command
def grow(
    checkpoint: Path,
    *,
    to: Path,
    out: Path,
    seed: int = 0,
    new_layers: Literal["copy", "random", "stack"] = "copy",
    free: Literal["initializer", "matching"] = "initializer",
    moments: Literal["mean", "zero"] = "mean",
    width: Literal["pad", "copies"] = "pad",
    snr_db: float | None = None,
    qk_noise: float | None = None,
    text: Path | None = None,
    measure: Annotated[bool, Parameter(negative="--no-measure")] = True,
    json_: Json = False,
) -> None:
    """Enlarge a model without changing its function, and prove it: a receipt is saved with the result.

    Args:
        checkpoint: A checkpoint folder, a run folder, or a Hugging Face folder.
        to: The larger spec, or a config.json.
        out: The new folder: Hugging Face's where one came in and its classes can express the target, else a checkpoint.
        seed: Of the random entries.
        new_layers: Weights of new layers: a copy of the layer before (output zeroed), random (output zeroed), or the whole
            stack repeated (not the same function).
        free: Spread of random entries: the model's initialiser, or that of the tensor they join.
        moments: Where second moments of new entries in old tensors start.
        width: New coordinates, heads and inner units beside the old ones (pad), or whole copies of the old ones (copies: integer
            multiples; also where a norm follows the residual sum).
        snr_db: With copies: noise on them that cancels, by its signal-to-noise ratio in dB (10 is usual); without it copies stay
            equal for ever.
        qk_noise: Where head_dim grows under a q/k norm over the whole head: spread of new queries, as a share of the usual
            (0.001 is usual). Not exact; the receipt says by how much.
        text: A file on whose first tokens logits are compared too.
        measure: Compare logits, find entries no gradient reaches, try one update.
    """
    from scantling import show
    from scantling.growth import Policy, grow_folder

    policy = Policy(
        seed=seed, new_layers=new_layers, free=free, moments=moments, width=width, snr_db=snr_db, qk_noise=qk_noise
    )
    receipt = grow_folder(checkpoint, to, out, policy, text, measure)
    if json_:
        print_json(receipt.to_json())
    else:
        show.growth(receipt)
