"""Losses of a model on held-out text."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from scantling.data.dataset import Dataset
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
    document_mask: bool = False,
) -> Iterator[tuple[float, int]]:
    """(summed cross-entropy in nats, tokens) of each batch of a fixed sweep through the validation split."""
    device = next(model.parameters()).device
    for batch in dataset.validation_batches(sequence_length, batch_sequences, max_tokens, documents=document_mask):
        inputs, labels = torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.labels).to(device)
        documents = None if batch.documents is None else torch.from_numpy(batch.documents).to(device)
        with autocast(precision, str(device)):
            total = model.total_loss(inputs, labels, documents)
        yield total.item(), labels.numel()


def validation(
    model: Decoder,
    dataset: Dataset,
    sequence_length: int,
    batch_sequences: int,
    max_tokens: int,
    precision: str = "float32",
    document_mask: bool = False,
) -> dict[str, float]:
    """Validation loss with its sampling error.

    Returns:
        `validation_loss` (nats per token), `validation_std_error` (between batches), `validation_tokens`, and
        `bits_per_byte` where the bytes of a token are known.
    """
    model.eval()
    most = max(max_tokens, sequence_length)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # `gaussian` transitions draw: the same at every evaluation, and nothing from the caller
        sums = list(batch_losses(model, dataset, sequence_length, batch_sequences, most, precision, document_mask))
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
    found = {
        "validation_loss": loss,
        "validation_std_error": spread,
        "bits_per_byte": bits,
        "validation_tokens": float(tokens),
    }
    return {name: value for name, value in found.items() if name != "bits_per_byte" or math.isfinite(value)}
