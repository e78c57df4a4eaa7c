"""The verbs between Hugging Face folders and checkpoints: import and export."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scantling.cli.app import Json, app, print_json

if TYPE_CHECKING:
    from scantling.hf_folder import Receipt

Compare = Annotated[bool, Parameter(name="--compare")]


@app.command(name="import")
def import_(folder: Path, *, out: Path, compare: Compare = True, json_: Json = False) -> None:
    """Make a checkpoint of a Hugging Face folder, for generate, evaluate, grow and export.

    Args:
        folder: With config.json and safetensors weights, as save_pretrained writes them.
        out: The checkpoint folder to make; must not exist.
        compare: Load the source with transformers, if installed, and compare its logits with the result's.
    """
    from scantling.hf_folder import import_folder

    _print(import_folder(folder, out, compare), json_)


@app.command
def export(
    checkpoint: Path, *, out: Path, dtype: str | None = None, compare: Compare = True, json_: Json = False
) -> None:
    """Make a folder that transformers loads of a checkpoint; a checkpoint of ours where no class of theirs can express it.

    Args:
        checkpoint: A run folder, or a checkpoint folder.
        out: The folder to make; must not exist.
        dtype: Of the weights: float32, bfloat16 (bf16) or float16 (fp16); default as they are.
        compare: Load the result with transformers, if installed, and compare its logits with the source's.
    """
    from scantling.hf_folder import export_checkpoint

    _print(export_checkpoint(checkpoint, out, dtype, compare), json_)


def _print(receipt: "Receipt", json_: bool) -> None:
    if json_:
        return print_json(asdict(receipt))
    what = f"a {receipt.model_type} model" if receipt.model_type else "in the format of a checkpoint"
    print(
        f"{receipt.out}: {what}, {receipt.parameters:,} parameters in {receipt.tensors:,} tensors, {receipt.bytes:,} bytes"
    )
    if receipt.why_own_format:
        print(receipt.why_own_format)
    if receipt.files:
        print(f"files carried over: {', '.join(receipt.files)}")
    if receipt.logit_difference is None:
        print(f"logits not compared: {receipt.not_compared}")
    else:
        print(
            f"largest difference between logits: {receipt.logit_difference:.2g} (of up to {receipt.largest_logit:.2g})"
        )
    return None
