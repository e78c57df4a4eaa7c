"""What a person sees of a growth."""

from typing import Any

from scantling.show.tables import console, empty_table


def growth(receipt: Any) -> None:
    """The receipt: steps, parameters, proof."""
    table = empty_table(f"{receipt.source} -> {receipt.out}", "expansion", "what")
    table.columns[1].justify = "left"
    for rule, text in _together(receipt.steps):
        table.add_row(rule, text)
    console.print(table)
    console.print(f"{receipt.params_before:,} parameters before, {receipt.params_after:,} after")
    if receipt.why_own_format is not None:
        console.print(f"written as a checkpoint of scantling's: {receipt.why_own_format}")
    if receipt.optimizer is not None:
        console.print(f"optimizer: {receipt.optimizer}")
    if not receipt.exact:
        console.print("This growth does not preserve the function:")
    for note in dict.fromkeys(receipt.notes):
        console.print(f"- {note}")
    if receipt.logit_difference is None:
        console.print(f"logits not compared: {receipt.not_measured}")
        return
    proof = empty_table(
        "largest logit difference", "precision", "random tokens", "given text", "the old model's own rounding"
    )
    for precision, difference in receipt.logit_difference.items():
        text = receipt.text_logit_difference
        proof.add_row(
            precision,
            f"{difference:.1e}",
            "" if text is None else f"{text[precision]:.1e}",
            "" if receipt.rounding is None else f"{receipt.rounding[precision]:.1e}",
        )
    console.print(proof)
    console.print(f"largest logit {receipt.largest_logit:.3g}")
    if receipt.not_measured is not None:
        console.print(f"nothing else measured: {receipt.not_measured}")
        return
    console.print(f"one sign-sized update of 1e-4 moves logits by {receipt.one_step:.2g}")
    if receipt.liveness is not None:
        console.print(f"a gradient reaches {receipt.liveness:.2%} of the new parameters within two steps")


def _together(steps: list[dict[str, str]]) -> list[tuple[str, str]]:
    """Rules and texts; the same growth of several layers on one line."""
    layers: dict[tuple[str, str], list[str]] = {}
    for step in steps:
        head, colon, rest = step["text"].partition(": ")
        alone = colon and head.startswith("layer ") and head[6:].isdigit()
        key = (step["rule"], rest if alone else step["text"])
        layers.setdefault(key, []).extend([head[6:]] if alone else [])
    return [(rule, f"{_named(found)}{text}") for (rule, text), found in layers.items()]


def _named(found: list[str]) -> str:
    if len(found) > 2 and [int(each) for each in found] == list(range(int(found[0]), int(found[-1]) + 1)):
        return f"layers {found[0]} to {found[-1]}: "
    return f"layer{'s' * (len(found) > 1)} {', '.join(found)}: " if found else ""
