"""Cases of plain, parallel and compressed GPTs (arXiv 2404.14462), both families of the authors' code.

Family a is post-norm with biases, no final norm, a split table and a raw mixing weight; family b is pre-norm, with maps into
the two stacks and a sigmoid; b-split is family b with the split table.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scantling.costing import cost
from scantling.model import Decoder, build
from scantling.resolve import spec_from
from scantling.rows import layer_rows
from scantling.spec import ModelSpec
from tests.parity.check import Case, Cases, Checks, Tensors, copy_in

LOGITS, LOSS, DOUBLE = 5e-5, 1e-5, 1e-10  # absolute: float32, float32, float64
GRADIENT = 1e-4  # of a tensor's largest value
NAMES = {
    "a": {
        "vocab": "vocab_size",
        "window": "context_length",
        "depth": "n_layers",
        "heads": "n_heads",
        "width": "d_model",
    },
    "b": {"vocab": "vocab_size", "window": "block_size", "depth": "n_layer", "heads": "n_head", "width": "n_embd"},
}


def cases(path: Path, data: Any) -> Cases | None:
    """The cases of a file of this format, or None."""
    if (
        isinstance(data, list)
        and data
        and all(isinstance(e, dict) and {"family", "arch", "total"} <= e.keys() for e in data)
    ):
        return (
            Case(
                "param_counts",
                f"{entry['family']} {entry['arch']} ({entry.get('setup', at)})",
                partial(check_count, entry),
            )
            for at, entry in enumerate(data)
        )
    if isinstance(data, dict) and {"family", "arch", "config"} <= data.keys():
        return iter([Case("models", data.get("case", path.stem), partial(check_model, data, path))])
    return None


def sizes(entry: dict[str, Any]) -> dict[str, int]:
    """vocab, window, depth, heads, width and `every` (blocks before a halving), whatever the family calls them."""
    config = entry["config"]
    result = {ours: config[theirs] for ours, theirs in NAMES[entry["family"][0]].items()}
    every = config.get("num_blocks_before_conv") if entry["arch"] == "conv" else None
    return {**result, "every": every or 2}


def block_widths(entry: dict[str, Any]) -> list[int]:
    """Widths of the blocks that are really built: the authors drop what does not divide into stacks or stages."""
    size = sizes(entry)
    match entry["arch"]:
        case "gpt":
            return [size["width"]] * size["depth"]
        case "parallel":
            return [size["width"]] * (2 * (size["depth"] // 2))
    stages = size["depth"] // size["every"]
    return [size["width"] >> stage for stage in range(stages) for _ in range(size["every"])]


def model_spec(entry: dict[str, Any], single_branch: str | None = None) -> ModelSpec:
    """The spec of a case, from its own configuration."""
    size, widths, family, arch = sizes(entry), block_widths(entry), entry["family"], entry["arch"]
    post, bias = family == "a", entry["config"].get("bias", entry["family"] == "a")
    norm = {"kind": "layer_norm", "eps": 1e-5, "bias": bias}
    mapping: dict[str, Any] = {
        "vocab_size": size["vocab"],
        "max_position_embeddings": size["window"],
        "hidden_size": widths,
        "num_hidden_layers": len(widths),
        "num_attention_heads": size["heads"],
        "attention_bias": bias,
        "position": "none",
        "learned_positions": True,
        "norm": norm,
        "norm_placement": "post_residual" if post else "pre",
        "final_norm": "none" if post else norm,
        "ffn": {"kind": "dense", "gated": False, "hidden_act": "gelu", "expansion": 4, "bias": bias},
        "lm_head_bias": post,
        "embedding_size": size["width"],
        "unembedding_size": widths[-1],
    }
    if arch == "parallel":
        split = family != "b"
        rule = {"a": "scaled", "b": "bare", "b-split": "normed"}[family]
        mapping["branches"] = {
            "count": 2,
            "entry": "split" if split else "projection",
            "mixing": "raw" if post else "sigmoid",
            "single_branch": single_branch or rule,
        }
        mapping["embedding_size"] = size["width"] * (2 if split else 1)
    elif arch != "gpt":
        mapping |= {"transition": "compress", "unembedding_size": widths[-1] // 2}
    return spec_from(mapping)


# --- names -------------------------------------------------------------------------------------------------------------

TOP = {
    "input_embedding.token_embedding": "embed_tokens",
    "input_embedding.pos_embedding": "embed_positions",
    "cls_net.1": "lm_head",
    "transformer.wte": "embed_tokens",
    "transformer.wpe": "embed_positions",
    "transformer.ln_f": "norm",
    "transformer.lin_1": "branches.entries.0",
    "transformer.lin_2": "branches.entries.1",
    "lm_head": "lm_head",
}
INSIDE = {
    "layer_norm_1": "input_layernorm",
    "layer_norm_2": "post_attention_layernorm",
    "masked_mha.o_proj": "self_attn.o_proj",
    "ffn.net.0": "mlp.up_proj",
    "ffn.net.3": "mlp.down_proj",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
FUSED = ("masked_mha.proj", "attn.c_attn")


class Names:
    """Recorded module paths to ours, for one architecture."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.depth, self.every, self.arch = len(block_widths(entry)), sizes(entry)["every"], entry["arch"]

    def flat(self, at: int) -> str:
        """Position `at` of a list of blocks and maps: `every` blocks, then a map, again and again."""
        if self.arch in ("gpt", "parallel"):
            return f"layers.{at}"
        stage, within = divmod(at, self.every + 1)
        return f"layers.{stage * self.every + within}" if within < self.every else self.map(stage)

    def map(self, stage: int) -> str:
        """The map after a stage is the one into the next stage's first block, or into the head."""
        layer = (stage + 1) * self.every
        return f"resize.{layer}.linear" if layer < self.depth else "resize_last.linear"

    def module(self, path: str) -> tuple[str, str]:
        """Our module, and what is left of the path inside a block."""
        if path in TOP:
            return TOP[path], ""
        if found := re.fullmatch(r"(?:decoder|transformer\.h)_([12])(?:\.blocks)?\.(\d+)\.(.+)", path):
            return f"layers.{(int(found[1]) - 1) * self.depth // 2 + int(found[2])}", found[3]
        if found := re.fullmatch(r"transformer\.h\.(\d+)\.(?:blocks\.(\d+)|conv_block\.block_(\d+))\.(.+)", path):
            within = int(found[2]) if found[2] is not None else int(found[3]) - 1
            return f"layers.{int(found[1]) * self.every + within}", found[4]
        if found := re.fullmatch(r"transformer\.h\.(\d+)\.(?:conv_layer|conv_block\.conv1)", path):
            return self.map(int(found[1])), ""
        if found := re.fullmatch(r"(?:decoder|lc_decoder|cc_decoder)\.blocks\.(\d+)(?:\.(.+))?", path):
            inside = found[2] if found[2] not in (None, "compress_layer") else ""
            return self.flat(int(found[1])), inside
        if found := re.fullmatch(r"transformer\.h\.(\d+)(?:\.(.+))?", path):
            return self.flat(int(found[1])), found[2] or ""
        raise ValueError(f"no name of ours for {path}")

    def pieces(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Our parameters that a recorded one fills: three for a fused q, k, v; a kernel-1 convolution is a matrix."""
        if name in ("weight", "transformer.wt"):
            return {"branches.weight": value.reshape(1)}
        path, leaf = name.rsplit(".", 1)
        module, inside = self.module(path)
        if inside in FUSED:
            parts = zip("qkv", value.chunk(3), strict=True)
            return {f"{module}.self_attn.{letter}_proj.{leaf}": part for letter, part in parts}
        full = f"{module}.{INSIDE[inside]}" if inside else module
        return {f"{full}.{leaf}": value.squeeze(-1) if value.ndim == 3 else value}

    def stage(self, name: str) -> str:
        """Our module whose output a recorded hidden state is."""
        if found := re.fullmatch(r"h_([12])\.(\d+)", name):
            return f"layers.{(int(found[1]) - 1) * self.depth // 2 + int(found[2])}"
        if name in ("lin_1", "lin_2"):
            return TOP[f"transformer.{name}"]
        at = int(name.removeprefix("stage"))
        return self.map(at) if self.arch == "conv" else self.flat(at)


# --- checks ------------------------------------------------------------------------------------------------------------


def check_model(entry: dict[str, Any], path: Path, checks: Checks) -> None:
    """Sizes, hidden states, logits, losses, gradients and greedy continuations, in float32 and float64."""
    stored, names = Tensors(path.with_suffix(".safetensors")), Names(entry)
    spec = model_spec(entry)
    checks.equal("parameters", cost(spec).params["total"], entry["parameters"])
    if "block_widths" in entry:
        checks.equal("block_widths", list(spec.widths), entry["block_widths"])
        checks.equal("final_width", spec.unembedding_size, entry["final_width"])
    weights: dict[str, Tensor] = {}
    for name, value in stored.all("param.").items():
        weights |= names.pieces(name, value)
    model = build(spec)
    copy_in(model, weights, checks)
    states: dict[str, Tensor] = {}
    for name in stored.all("hidden."):
        module = model.get_submodule(names.stage(name))
        module.register_forward_hook(lambda _m, _args, out, at=name: states.update({at: out.detach().clone()}))
    tokens, labels = stored["input.tokens"], stored["input.targets"]
    logits = model(tokens)
    checks.close("logits", logits, stored["expect.logits"], absolute=LOGITS)
    for name, state in stored.all("hidden.").items():
        checks.close(f"hidden.{name}", states[name], state, absolute=LOGITS)
    loss = model.loss(tokens, labels)
    checks.close("loss", loss, stored["expect.loss"], absolute=LOSS)
    loss.backward()
    for name, value in stored.all("expect_grad.").items():
        largest = float(value.abs().max())
        for own, part in names.pieces(name, value).items():
            got = model.get_parameter(own).grad
            checks.close(f"gradient of {name}", got, part, absolute=GRADIENT * largest)
    double = build(spec).double()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        checks.close("logits in float64", double(tokens), stored["expect64.logits"], absolute=DOUBLE)
        for what, want in (("recorded tensor", stored["expect64.loss"]), ("number", entry["loss"])):
            checks.close(f"loss in float64 ({what})", double.loss(tokens, labels), want, absolute=DOUBLE)
        _check_greedy(model, "greedy", False, stored, checks)
        if entry["arch"] == "parallel":
            _check_single_path(entry, model, double, stored, checks)
    stored.check_all_used(checks)


def _check_single_path(entry: dict[str, Any], model: Decoder, double: Decoder, stored: Tensors, checks: Checks) -> None:
    """One stack alone: as released, and with the final norm where that is recorded."""
    mixing, tokens, labels = entry["mixing"], stored["input.tokens"], stored["input.targets"]
    shares = double.branches.weights()
    checks.close("path1_weight", shares[0], mixing["path1_weight"], absolute=LOSS)
    checks.equal("single_path_used", int(shares.argmax()) + 1, mixing["single_path_used"])
    checks.equal("mode", double.branches.spec.mixing, mixing["mode"])
    corrected = build(model_spec(entry, "normed"))
    corrected.load_state_dict(model.state_dict())
    exact = build(model_spec(entry, "normed")).double()
    exact.load_state_dict(model.state_dict())
    for name, single, twin in (
        ("single_path_logits", model, double),
        ("single_path_logits_with_final_norm", corrected, exact),
    ):
        if f"expect.{name}" in stored:
            checks.close(name, single(tokens, single_branch=True), stored[f"expect.{name}"], absolute=LOGITS)
        if f"expect64.{name}" in stored:
            got = twin(tokens, single_branch=True)
            checks.close(f"{name} in float64", got, stored[f"expect64.{name}"], absolute=DOUBLE)
    for prefix, single, tolerance in (("expect", model, LOSS), ("expect64", double, DOUBLE)):
        if f"{prefix}.single_path_loss" in stored:
            flat = single(tokens, single_branch=True).flatten(0, 1)
            loss = F.cross_entropy(flat, labels.flatten(), ignore_index=-1)
            checks.close(f"{prefix} single_path_loss", loss, stored[f"{prefix}.single_path_loss"], absolute=tolerance)
            if prefix == "expect64" and "single_path_loss" in entry:
                checks.close("single_path_loss (number)", loss, entry["single_path_loss"], absolute=tolerance)
    _check_greedy(model, "greedy_single_path", True, stored, checks)


def _check_greedy(model: Decoder, name: str, single: bool, stored: Tensors, checks: Checks) -> None:
    """Arg-max continuation; each step reads the last window of tokens, positions from 0."""
    if f"expect.{name}" not in stored:
        return
    want = stored[f"expect.{name}"]
    ids = stored["input.prompt"]
    while ids.shape[1] < want.shape[1]:
        logits = model(ids[:, -model.spec.max_position_embeddings :], single_branch=single)
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    checks.equal(name, ids, want)


def check_count(entry: dict[str, Any], checks: Checks) -> None:
    """Exact totals and tables, through the rows of a cost."""
    spec = model_spec(entry)
    found = cost(spec)
    checks.equal("total", found.params["total"], entry["total"])
    parts = {"token_table": "embedding", "position_table": "positions", "head": "head"}
    for key, component in parts.items():
        if key in entry:
            checks.equal(key, sum(row.params for row in found.rows if row.component == component), entry[key])
    if "without_second_path" in entry:
        stack = sum(row.params for layer in spec.stacks[1] for row in layer_rows(layer, None))
        entries = sum(row.params for row in found.rows if row.component == "branches") - 1  # less the mixing weight
        checks.equal("without_second_path", found.params["total"] - stack - entries // 2, entry["without_second_path"])
