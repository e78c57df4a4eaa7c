"""Text from a trained model, and its losses: what a checkpoint can do on its own."""

from pathlib import Path

import numpy as np
import torch

from scantling.checkpoint import load_model
from scantling.config import load_run
from scantling.data import DataConfig, Dataset, prepare
from scantling.data.corpus import TokenizerFile
from scantling.device import processor
from scantling.errors import InputError
from scantling.evaluate import validation
from scantling.hf_folder import FILES, TOKENIZER, imported_tokenizer, prompt_ids
from scantling.model import Cache, Decoder
from scantling.model.premerge import prepare_for_decoding


def _opened(path: Path) -> tuple[Decoder, Dataset, Path]:
    """The model of a run or checkpoint folder, the run's dataset, and the run folder."""
    if not path.is_dir():
        raise InputError(f"{path}: expected a run folder or a checkpoint folder")
    run = path if (path / "config.yaml").exists() else path.parent.parent
    if not (run / "config.yaml").exists():
        raise InputError(f"{path}: expected a run folder (with config.yaml) or a checkpoint inside one")
    return load_model(path), prepare(load_run(run / "config.yaml").data), run


@torch.inference_mode()
def generate(path: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> str:
    """Continue `prompt`, token by token with a key/value cache.

    Raises:
        InputError: no such checkpoint, an impossible setting, or a prompt the tokenizer or the context cannot hold.
    """
    if max_new_tokens < 1 or temperature < 0:
        raise InputError(
            f"expected max_new_tokens of at least 1 and temperature of at least 0, got {max_new_tokens}, {temperature}"
        )
    imported = imported_tokenizer(path)
    if imported is not None:
        model, start = load_model(path), prompt_ids(path, imported, prompt)
    else:
        model, dataset, _ = _opened(path)
        start = dataset.tokenizer.encode(prompt) if prompt else np.array([dataset.tokenizer.end_of_document or 0])
    tokenizer = imported or dataset.tokenizer
    end = tokenizer.end_of_document
    capacity = len(start) + max_new_tokens
    if capacity > model.spec.max_position_embeddings:
        raise InputError(
            f"prompt ({len(start)} tokens) and max_new_tokens ({max_new_tokens}) exceed the model's context of "
            f"{model.spec.max_position_embeddings}"
        )
    model = prepare_for_decoding(model, processor=processor())
    cache, generator = Cache(model.spec, 1, capacity), torch.Generator().manual_seed(seed)
    ids, found = torch.from_numpy(start.astype("int64"))[None], []
    for _ in range(max_new_tokens):
        logits = model(ids, cache)[0, -1, : tokenizer.vocab_size]
        if temperature == 0:
            token = logits.argmax()[None]
        else:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        if token.item() == end:
            break
        found.append(int(token))
        ids = token[None]
    return tokenizer.decode(torch.tensor(found, dtype=torch.long).numpy())


def evaluate_checkpoint(path: Path, max_tokens: int, text: Path | None = None) -> dict[str, float]:
    """Validation loss, its sampling error and bits per byte on the run's own validation split.

    Args:
        text: for an imported checkpoint, which has no run: a text file or a folder of them, of which the part counts that a
            run on it would hold out.

    Raises:
        InputError: no such checkpoint, or an imported one without text or tokenizer.
    """
    tokenizer = imported_tokenizer(path)
    if text is not None or tokenizer is not None:
        if text is None or tokenizer is None:
            raise InputError(
                f"{path}: --data goes with an imported checkpoint that has a tokenizer.json, and it needs it"
            )
        file = TokenizerFile(
            kind="file",
            path=str(path / FILES / TOKENIZER),
            end_of_document=tokenizer.library.id_to_token(tokenizer.end_of_document),
        )
        model, dataset = load_model(path), prepare(DataConfig(source=str(text), tokenizer=file))
        length = min(1024, model.spec.max_position_embeddings)
    else:
        model, dataset, run = _opened(path)
        length = load_run(run / "config.yaml").train.sequence_length
    return validation(model, dataset, length, max(1, 8192 // length), max_tokens)
