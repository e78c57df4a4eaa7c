"""Losses of a model on held-out text."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from scantling.data import Dataset
from scantling.device import DTYPES
from scantling.model import Decoder


def autocast(precision: str, device: str) -> AbstractContextManager[object]:
    """bfloat16 autocast, or nothing for float32."""
    return (
        nullcontext() if precision == "float32" else torch.autocast(torch.device(device).type, dtype=DTYPES[precision])
    )


@torch.no_grad()
def batch_losses(
    model: Decoder,
    dataset: Dataset,
    sequence_length: int,
    batch_sequences: int,
    max_tokens: int,
    precision: str = "float32",
) -> Iterator[tuple[float, int]]:
    """(summed loss in nats, tokens) of each batch of a fixed sweep through the validation split."""
    device = next(model.parameters()).device
    for inputs, labels in dataset.validation_batches(sequence_length, batch_sequences, max_tokens):
        with autocast(precision, str(device)):
            logits = model(torch.from_numpy(inputs).to(device))
        targets = torch.from_numpy(labels).to(device)
        yield F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum").item(), labels.size


def validation(
    model: Decoder,
    dataset: Dataset,
    sequence_length: int,
    batch_sequences: int,
    max_tokens: int,
    precision: str = "float32",
) -> dict[str, float]:
    """Validation loss with its sampling error.

    Returns:
        `validation_loss` (nats per token), `validation_std_error` (between batches), `bits_per_byte`, `validation_tokens`.
    """
    model.eval()
    sums = list(
        batch_losses(model, dataset, sequence_length, batch_sequences, max(max_tokens, sequence_length), precision)
    )
    model.train()
    tokens = sum(count for _, count in sums)
    loss = math.fsum(total for total, _ in sums) / tokens
    means = [total / count for total, count in sums]
    spread = (
        math.sqrt(sum((mean - loss) ** 2 for mean in means) / max(1, len(means) - 1) / len(means))
        if len(means) > 1
        else 0.0
    )
    bits = loss / math.log(2) / dataset.bytes_per_token("validation")
    return {
        "validation_loss": loss,
        "validation_std_error": spread,
        "bits_per_byte": bits,
        "validation_tokens": float(tokens),
    }
