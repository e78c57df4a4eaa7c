"""Hugging Face folders in and out: weights streamed, small files carried, and the logits of both sides compared.

A checkpoint that came from Hugging Face holds the small files of its source in `hugging_face/`: its config.json, tokenizer and
generation settings. Export brings them back unchanged, but for config.json, which says what the model is now.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scantling import checkpoint
from scantling.costing import param_counts
from scantling.data.tokens import IdArray, JsonTokenizer, read_tokenizer
from scantling.device import available_memory
from scantling.errors import InputError
from scantling.files import SPEC, STATE, checkpoint_folder, write_json
from scantling.hf_classes import DEFAULTS, GPT2_NAMES
from scantling.hf_config import OPTIONAL
from scantling.hf_weights import cast, from_hf, main_dtype, to_hf
from scantling.hf_writer import same_function, to_hf_config
from scantling.model import Decoder, build_meta
from scantling.resolve import load_spec, spec_from, to_mapping
from scantling.rows import rows
from scantling.spec import ModelSpec
from scantling.tensor_files import (
    CHECKSUMS,
    Produced,
    Tensors,
    Written,
    digest,
    needed,
    new_folder,
    open_tensors,
    verify,
    write_shards,
)
from scantling.yamlio import load

FILES, CONFIG, TOKENIZER = "hugging_face", "config.json", "tokenizer.json"
CARRIED = re.compile(r"(?!checksums\.json$|.*\.index\.json$).+\.(json|txt|model|jinja|tiktoken)$|(LICENSE|NOTICE).*")
CHECKED_TOKENS = 32
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class Receipt:
    """What was written, and whether it is the same function.

    Attributes:
        model_type: the Hugging Face class; None for our own format.
        why_own_format: a sentence, where no class can express the model.
        logit_difference: largest absolute difference between the logits of source and result on random tokens, both
            computed in float32, one of them by transformers' own class; None with a reason in `not_compared`.
        largest_logit: of the source, for scale.
    """

    source: str
    out: str
    model_type: str | None
    why_own_format: str | None
    parameters: int
    tensors: int
    bytes: int
    dtypes: list[str]
    files: list[str]
    logit_difference: float | None
    largest_logit: float | None
    not_compared: str | None


# --- in ----------------------------------------------------------------------------------------------------------------


def import_folder(source: Path, out: Path, compare: bool = True) -> Receipt:
    """A Hugging Face folder as a checkpoint of ours, in the dtypes it has.

    Raises:
        InputError: no config.json of a supported class, tensors that do not fit it, or an existing `out`.
        RunError: the disk is full or not writable.
    """
    if not (source / CONFIG).is_file():
        raise InputError(f"{source}: has no {CONFIG}; expected a folder as save_pretrained writes it")
    config, spec = load(source / CONFIG).value, load_spec(source / CONFIG)
    weights = from_hf(open_tensors(source), config, spec)
    state = {"step": 0, "imported": {"model_type": config["model_type"], "folder": source.resolve().name}}
    files = source_files(source)
    written = write_checkpoint(out, spec, weights, state, files)
    kind, reason = config["model_type"], None if compare else "not asked for"
    return _receipt(source, out, kind, None, spec, weights, written, files, source, reason)


def write_checkpoint(
    out: Path,
    spec: ModelSpec,
    weights: Tensors,
    state: Mapping[str, Any],
    files: Sequence[Path] = (),
    groups: Mapping[str, Mapping[str, Tensor]] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Written:
    """A checkpoint folder, one tensor of the weights in memory at a time; whole or not at all.

    Args:
        weights: the parameters of the module of `spec`.
        state: what state.json holds beside the checksums; `step` at least.
        files: go to `hugging_face/`.
        groups: tensors beside the weights, a file each: optimizer state, averages.
        more: JSON files to add, by name.

    Raises:
        InputError: the folder exists.
        RunError: the disk is full or not writable.
    """
    with new_folder(out, needed(weights)) as temporary:
        written = write_shards(temporary, weights)
        for name, group in (groups or {}).items():
            checkpoint.write_tensors(group, temporary / f"{name}.safetensors")
        for name, content in {SPEC: to_mapping(spec), **(more or {})}.items():
            write_json(temporary / name, content)
        write_json(temporary / STATE, {**state, "sha256": _checksums(temporary, written)})
        if files:
            (temporary / FILES).mkdir()
            for path in files:
                shutil.copyfile(path, temporary / FILES / path.name)
    return written


def carried_files(folder: Path) -> list[Path]:
    """The small files of its source that a checkpoint holds, for `write_checkpoint`."""
    return sorted((folder / FILES).iterdir()) if (folder / FILES).is_dir() else []


def imported_tokenizer(folder: Path) -> JsonTokenizer | None:
    """The tokenizer of an imported checkpoint; None when it has none.

    Raises:
        InputError: it cannot be read, or no token ends a document.
    """
    path = folder / FILES / TOKENIZER
    if not path.is_file():
        return None
    ends = load(folder / FILES / CONFIG).value.get("eos_token_id")
    end = ends[0] if isinstance(ends, list) and ends else ends
    vocabulary = {entry["id"]: entry["content"] for entry in _added_tokens(path)}
    return read_tokenizer(path, vocabulary.get(end))


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", [])
        return [entry for entry in found if isinstance(entry.get("id"), int) and isinstance(entry.get("content"), str)]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a {TOKENIZER}: {error}") from None


def prompt_ids(folder: Path, tokenizer: JsonTokenizer, prompt: str) -> IdArray:
    """Ids of a prompt, with the beginning-of-text token where the model's own tokenizer puts one."""
    begin = load(folder / FILES / CONFIG).value.get("bos_token_id")
    first = tokenizer.library.encode("", add_special_tokens=True).ids[:1]
    start = first if first == [begin] else []
    return np.array([*start, *tokenizer.encode(prompt)] or [tokenizer.end_of_document])


# --- out ---------------------------------------------------------------------------------------------------------------


def export_checkpoint(source: Path, out: Path, dtype: str | None = None, compare: bool = True) -> Receipt:
    """A checkpoint as a folder that stock transformers loads; as a checkpoint of ours where no class can express it.

    Args:
        source: a checkpoint folder, or a run folder (its newest checkpoint); averaged weights where the run kept them.
        dtype: of the weights; None keeps theirs.

    Raises:
        InputError: no checkpoint, damaged files, an unknown dtype, or an existing `out`.
        RunError: the disk is full or not writable.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    folder = checkpoint_folder(source)
    spec, weights = open_checkpoint(folder)
    files = carried_files(folder)
    kept = load(folder / FILES / CONFIG).value if (folder / FILES / CONFIG).is_file() else {}
    try:
        config = stock_config(spec, kept)
    except InputError as error:
        state = {"step": 0, "exported": {"folder": source.resolve().name}}
        written = write_checkpoint(out, spec, cast(weights, DTYPES[dtype]) if dtype else weights, state, files)
        return _receipt(source, out, None, str(error), spec, weights, written, files, None, "no class to compare with")
    kind = config["model_type"]
    theirs = to_hf(weights, spec, kind)
    theirs = cast(theirs, DTYPES[dtype]) if dtype else theirs
    files = [path for path in files if path.name != CONFIG]
    written = _write_stock(out, theirs, config, files, {})
    reason = None if compare else "not asked for"
    return _receipt(source, out, kind, None, spec, weights, written, files, out, reason)


def write_stock(
    out: Path,
    spec: ModelSpec,
    weights: Tensors,
    config: Mapping[str, Any],
    files: list[Path],
    more: Mapping[str, Any],
) -> Written:
    """A folder that stock transformers loads; whole or not at all.

    Args:
        weights: the parameters of the module of `spec`.
        config: as `stock_config` gives it.
        files: to carry along.
        more: JSON files to add, by name.
    """
    return _write_stock(out, to_hf(weights, spec, config["model_type"]), config, files, more)


def _write_stock(
    out: Path, theirs: Tensors, config: Mapping[str, Any], files: list[Path], more: Mapping[str, Any]
) -> Written:
    dtype = "dtype" if "dtype" in config else "torch_dtype"
    with new_folder(out, needed(theirs)) as temporary:
        written = write_shards(temporary, theirs)
        for name, content in {**more, CONFIG: {**config, dtype: _name(main_dtype(theirs))}}.items():
            write_json(temporary / name, content)
        for path in files:
            shutil.copyfile(path, temporary / path.name)
        write_json(temporary / CHECKSUMS, {"sha256": _checksums(temporary, written)})
    return written


def _checksums(folder: Path, written: Written) -> dict[str, str]:
    """Of all files so far; those of the shards were taken on their way to the disk."""
    return {
        **{file.name: digest(file) for file in sorted(folder.iterdir()) if file.name not in written.sha256},
        **written.sha256,
    }


def source_files(folder: Path) -> list[Path]:
    """The small files of a Hugging Face folder that go wherever its weights go."""
    return sorted(path for path in folder.iterdir() if path.is_file() and CARRIED.fullmatch(path.name))


def open_checkpoint(folder: Path) -> tuple[ModelSpec, Tensors]:
    """The spec and the weights of a checkpoint folder, tensors read when asked for; averaged weights where it has them.

    Raises:
        InputError: a file is missing, altered, or not what it should be.
    """
    verify(folder, STATE)
    spec = spec_from(load(folder / SPEC).value, str(folder / SPEC))
    weights = open_tensors(folder)
    average = folder / f"{checkpoint.AVERAGE}.safetensors"
    if not average.is_file():
        return spec, weights
    averaged = open_tensors(average)
    sources = {name: averaged if name in averaged.names else weights for name in weights.names}
    kinds = {name: (tensors.shape(name), tensors.dtype(name)) for name, tensors in sources.items()}
    return spec, Produced(kinds, lambda name: sources[name].tensor(name))


def stock_config(spec: ModelSpec, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a spec: `kept` if it says just this, else its class if that can, with what else `kept` says.

    Raises:
        InputError: no class can express the spec.
    """
    kind = kept.get("model_type")
    if kept and same_function(spec_from(dict(kept))) == same_function(spec):
        return dict(kept)
    try:
        config = to_hf_config(spec, kind)
    except InputError:
        config = to_hf_config(spec)
    sizes = {*DEFAULTS[config["model_type"]], *OPTIONAL, *GPT2_NAMES, "torch_dtype", "dtype"}
    rest = {key: value for key, value in kept.items() if key not in sizes} if kind == config["model_type"] else {}
    return {**config, **rest}


# --- the same function? ------------------------------------------------------------------------------------------------


def _receipt(
    source: Path,
    out: Path,
    kind: str | None,
    why: str | None,
    spec: ModelSpec,
    ours: Tensors,
    written: Written,
    files: list[Path],
    theirs: Path | None,
    reason: str | None,
) -> Receipt:
    difference = largest = None
    parameters = param_counts(rows(spec))["total"]
    if theirs is not None and reason is None:
        reason = _obstacle(parameters)
        if reason is None:
            difference, largest = logit_difference(spec, ours, theirs)
    result = open_tensors(out)
    dtypes = sorted({_name(result.dtype(name)) for name in result.names})
    names = [path.name for path in files]
    return Receipt(
        str(source),
        str(out),
        kind,
        why,
        parameters,
        written.tensors,
        written.bytes,
        dtypes,
        names,
        difference,
        largest,
        reason,
    )


def _obstacle(parameters: int) -> str | None:
    if find_spec("transformers") is None:
        return "transformers is not installed (pip install 'scantling[hf]')"
    wanted, free = 5 * parameters, available_memory()
    return f"the model in float32 needs {wanted:,} bytes of memory, {free:,} are free" if wanted > free else None


@torch.inference_mode()
def logit_difference(spec: ModelSpec, ours: Tensors, theirs: Path) -> tuple[float, float]:
    """Largest difference between our logits and those of transformers' class, and its largest logit; one model at a time."""
    import transformers

    length = min(CHECKED_TOKENS, spec.max_position_embeddings)
    ids = torch.randint(spec.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            theirs, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        expected = model.eval()(ids, use_cache=False).logits
        del model
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        transformers.utils.logging.enable_progress_bar()
    found = load_weights(spec, ours)(ids)
    return float((found - expected).abs().max()), float(expected.abs().max())


def load_weights(spec: ModelSpec, weights: Tensors, dtype: torch.dtype = torch.float32) -> Decoder:
    """The module with these weights, which are read one at a time, for inference."""
    model = build_meta(spec).to(dtype).to_empty(device="cpu")
    if spec.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.tensor(name))
    return model.eval()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
