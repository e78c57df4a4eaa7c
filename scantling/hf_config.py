"""A stock Hugging Face `config.json` as a spec document: its keys are already ours; what is not a size is left out."""

from typing import Any

from scantling.errors import InputError
from scantling.yamlio import Document, show

SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
)
LLAMA_LIKE = ("llama",)


def is_config(value: dict[str, Any]) -> bool:
    """Whether a mapping is a `config.json` (it names its class), not one of our own files."""
    return "model_type" in value or "architectures" in value


def translate(document: Document) -> Document:
    """The document with only the keys that describe sizes; unchanged when it is not a `config.json`.

    Raises:
        InputError: a model type, or a setting that changes the function, which has no equal here.
    """
    config = document.value
    if not is_config(config):
        return document
    kind = config.get("model_type")
    if kind not in LLAMA_LIKE:
        raise InputError(document.fault(("model_type",), f"expected one of {', '.join(LLAMA_LIKE)}, got {show(kind)}"))
    faults = []
    scaling = config.get("rope_scaling") or (config.get("rope_parameters") or {})
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        faults.append(
            document.fault(("rope_scaling",), f"scaled rotary frequencies are not supported, got {show(scaling)}")
        )
    if faults:
        raise InputError(*faults)
    value = {key: config[key] for key in SIZE_KEYS if config.get(key) is not None}
    if isinstance(scaling, dict) and "rope_theta" in scaling:
        value.setdefault("rope_theta", scaling["rope_theta"])
    return Document(value, document.source, document.places)
