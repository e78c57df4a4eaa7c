"""The six expansions of arXiv 2308.06103 as its authors' notebook applies them, and the copies of arXiv 2409.12903.

The models of the first are no causal language models, so what is compared is the tensors: old entries must sit where theirs do
with their values, and be zero where theirs must be. The expanded model is then run by a few lines of its own.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scantling.growth.axes import shapes
from scantling.growth.copies import grow_by_copies
from scantling.growth.depth import insert_layers
from scantling.growth.noise import Noise
from scantling.growth.path import path
from scantling.growth.receipt import new_entries
from scantling.growth.steps import Step, copied
from scantling.growth.weights import applied
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from scantling.tensor_files import Held
from tests.parity.check import Case, Checks

EPS = 1e-6
DEFAULTS = {"dim_h": 5, "dim_p": 4, "dim_E": 1, "dim_k": 2, "dim_v": 2, "dim_N": 1, "dim_hout": 2}


def cases(path: Path, data: Any) -> list[Case] | None:
    if not isinstance(data, dict) or not {"free_entry_placeholder", "clone_matrix_noise"} & data.keys():
        return None
    if "cases" in data:
        return [Case("expansion", case["name"], partial(_expansion, case)) for case in data["cases"]]
    matrices = [
        Case("copies", f"{case['dst_shape']}{' shared out' * case['normalize']}", partial(_clone, case))
        for case in data["clone_matrix"]
    ]
    others = [
        Case("copies", "vector", partial(_vector, data["clone_vector"])),
        Case("copies", "noise", partial(_noise, data["clone_matrix_noise"], data["forward_check"])),
    ]
    return matrices + others


def _spec(sizes: dict[str, int], eps: float) -> ModelSpec:
    d = {**DEFAULTS, **sizes}
    return spec_from(
        {
            "vocab_size": d["dim_hout"], "hidden_size": d["dim_h"], "num_hidden_layers": d["dim_N"],
            "num_attention_heads": d["dim_E"], "head_dim": d["dim_k"], "v_head_dim": d["dim_v"], "position": "none",
            "max_position_embeddings": 2, "learned_positions": True, "rms_norm_eps": eps, "final_norm": "none",
            "ffn": {"kind": "dense", "gated": False, "hidden_act": "relu", "bias": True, "intermediate_size": d["dim_p"]},
        }
    )  # fmt: skip


def _ours(params: dict[str, Any], spec: ModelSpec) -> dict[str, Tensor]:
    """Their parameters under our names, matrices transposed and heads joined; those they leave out are absent."""
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in params.items()}
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(spec.layers):
        prefix, our = f"layers_{index}/", f"layers.{index}."
        if not any(name.startswith(prefix) for name in given):
            prefix = ""
        mha, mlp = (f"{prefix}{part}/" if f"{prefix}{part}/" in " ".join(given) else prefix for part in ("MHA", "MLP"))
        heads = range(layer.num_attention_heads)
        for kind, name in (("W_Q", "q_proj"), ("W_K", "k_proj"), ("W_V", "v_proj")):
            parts = [given.get(f"{mha}heads_{head}/{kind}/kernel") for head in heads]
            if all(part is not None for part in parts):
                found[f"{our}self_attn.{name}.weight"] = torch.cat([part.T for part in parts if part is not None])
        parts = [given.get(f"{mha}W_Oe_{head}/kernel") for head in heads]
        if all(part is not None for part in parts):
            found[f"{our}self_attn.o_proj.weight"] = torch.cat([part for part in parts if part is not None]).T
        for theirs, name in (("MLP_l1", "up_proj"), ("MLP_l2", "down_proj")):
            if f"{mlp}{theirs}/kernel" in given:
                found[f"{our}mlp.{name}.weight"] = given[f"{mlp}{theirs}/kernel"].T
                found[f"{our}mlp.{name}.bias"] = given[f"{mlp}{theirs}/bias"]
        for theirs, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            if f"{prefix}{theirs}/scale" in given:
                found[f"{our}{name}.weight"] = given[f"{prefix}{theirs}/scale"]
    if "outlayer/kernel" in given:
        found["lm_head.weight"] = given["outlayer/kernel"].T
    if "PosE/PosE" in given:
        found["embed_positions.weight"] = given["PosE/PosE"][0]
    return found


def _steps(source: ModelSpec, target: ModelSpec) -> list[Step]:
    """Our path, with new layers at the end as theirs are."""
    inner = target.replace(layers=target.layers[: len(source.layers)])
    steps = list(path(source, inner))
    if len(target.layers) > len(source.layers):
        steps.append(insert_layers(inner, target, list(range(len(source.layers))), "random"))
    return steps


def _expansion(case: dict[str, Any], checks: Checks) -> None:
    source = _spec(case["src"], EPS)
    width, wide = (({**DEFAULTS, **case[key]})["dim_h"] for key in ("src", "dst"))
    target = _spec({**case["src"], **case["dst"]}, EPS * width / wide)
    steps, given = _steps(source, target), _ours(case["params_src"], source)
    whole = Held(_whole(given, source))
    grown = applied(whole, steps)
    theirs, made = _ours(case["params_dst"], target), {}
    for name, new in new_entries(steps, whole).items():
        if name not in theirs:
            continue
        want, made[name] = theirs[name], grown.tensor(name)
        checks.close(f"{name}: old entries", made[name][~new], want[~new], 1e-12)
        loose = torch.zeros_like(new)
        if want.ndim == 2:  # free, and zero in theirs: new rows x new columns, and all new inputs of keys that grow
            loose = new.all(0, keepdim=True) & (new.all(-1, keepdim=True) | name.endswith("k_proj.weight"))
        bound = new & (want == 0) & ~loose
        checks.close(f"{name}: zeros", made[name][bound], want[bound], 0.0)
    x, y = torch.tensor(case["x"], dtype=torch.float64), torch.tensor(case["y_src"], dtype=torch.float64)
    checks.close("their source model", _run(x, given, source, EPS), y, 1e-12)
    widened = torch.nn.functional.pad(x, (0, wide - x.shape[-1]))
    found = _run(widened, made, target, EPS * width / wide)
    checks.close("our grown model", found[..., : y.shape[-1]], y, 1e-12)
    if found.shape[-1] > y.shape[-1]:
        checks.close(
            "new coordinates of its output", found[..., y.shape[-1] :], torch.zeros(*y.shape[:-1], wide - width), 1e-12
        )


def _whole(given: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """Every parameter of the source, those the case leaves out as zeros."""
    return {name: given.get(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes(spec).items()}


def _run(x: Tensor, weights: dict[str, Tensor], spec: ModelSpec, eps: float) -> Tensor:
    """Their model: whatever parts of it a case has."""

    def norm(x: Tensor, name: str) -> Tensor:
        gain = weights.get(name)
        return x if gain is None else x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain

    alone = "layers.0.input_layernorm.weight" not in weights  # one sub-layer without its residual
    if "embed_positions.weight" in weights:
        x = x + weights["embed_positions.weight"]
    for index, layer in enumerate(spec.layers):
        p = f"layers.{index}."
        if f"{p}self_attn.q_proj.weight" in weights:
            z = norm(x, f"{p}input_layernorm.weight")
            q, k, v = (
                (z @ weights[f"{p}self_attn.{name}.weight"].T)
                .unflatten(-1, (layer.num_attention_heads, -1))
                .transpose(-2, -3)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            mixed = (q @ k.transpose(-1, -2) / math.sqrt(layer.head_dim)).softmax(-1) @ v
            y = mixed.transpose(-2, -3).flatten(-2) @ weights[f"{p}self_attn.o_proj.weight"].T
            x = y if alone else x + y
        if f"{p}mlp.up_proj.weight" in weights:
            z = norm(x, f"{p}post_attention_layernorm.weight")
            z = torch.relu(z @ weights[f"{p}mlp.up_proj.weight"].T + weights[f"{p}mlp.up_proj.bias"])
            y = z @ weights[f"{p}mlp.down_proj.weight"].T + weights[f"{p}mlp.down_proj.bias"]
            x = y if alone else x + y
    return x @ weights["lm_head.weight"].T if "lm_head.weight" in weights else x


# --- copies ------------------------------------------------------------------------------------------------------------


def _copied(name: str, source: list[Any], spec: ModelSpec, target: ModelSpec, shares: bool = True) -> Tensor:
    """One tensor of a model grown by copies; without `shares` inputs are repeated undivided too."""
    step = grow_by_copies(spec, target)
    assert step is not None
    if not shares:
        whole = {dim: dataclasses.replace(change, copies="whole") for dim, change in step.changes.items()}
        step = dataclasses.replace(step, changes=whole)
    weights = {each: torch.zeros(shape, dtype=torch.float64) for each, shape in shapes(spec).items()}
    return applied(Held(weights | {name: torch.tensor(source, dtype=torch.float64)}), [step]).tensor(name)


def _sized(hidden: int, inner: int) -> ModelSpec:
    heads = {"num_attention_heads": 1, "head_dim": 2, "num_hidden_layers": 1, "vocab_size": 3}
    return spec_from({**heads, "hidden_size": hidden, "intermediate_size": inner})


UP, GAIN = "layers.0.mlp.up_proj.weight", "layers.0.input_layernorm.weight"


def _matrix(source: list[list[float]], shape: list[int], shares: bool = True) -> Tensor:
    """A matrix (inner x hidden) copied to a shape."""
    return _copied(UP, source, _sized(len(source[0]), len(source)), _sized(shape[1], shape[0]), shares)


def _clone(case: dict[str, Any], checks: Checks) -> None:
    checks.close("copied matrix", _matrix(case["src"], case["dst_shape"], case["normalize"]), case["dst"], 1e-15)


def _vector(case: dict[str, Any], checks: Checks) -> None:
    (size,) = case["dst_shape"]
    checks.close("copied vector", _copied(GAIN, case["src"], _sized(len(case["src"]), 4), _sized(size, 4)), case["dst"])


def _noise(case: dict[str, Any], forward: dict[str, Any], checks: Checks) -> None:
    """Their random numbers, our noise."""
    out, into = len(case["src"]), len(case["src"][0])
    more, wide = (new // old for new, old in zip(case["dst_shape"], (out, into), strict=True))
    generator = torch.Generator().manual_seed(case["torch_seed"])
    drawn = {
        (copy, pair): torch.randn(out, into, dtype=torch.float64, generator=generator)
        for copy in range(more)
        for pair in range(wide // 2)
    }
    grown, inputs = _matrix(case["src"], case["dst_shape"]), copied(into, wide)
    power = float(grown.square().mean())
    noise = Noise(
        copied(out, more), inputs, power, case["snr_db"], lambda copy, pair, first, last: drawn[copy, pair][first:last]
    )
    noise.add(grown, 0)
    checks.close("noisy copies", grown, case["dst"], 1e-14)
    checks.close("sums of the copies", sum(grown.chunk(wide, 1)), case["block_sum"], 1e-14)
    x = torch.tensor(forward["x"], dtype=torch.float64)
    source = torch.tensor(case["src"], dtype=torch.float64)
    checks.close("their output", x @ source.T, forward["y"], 1e-14)
    checks.close("output of the copies", x[:, inputs] @ grown.T, forward["y_cloned"], 1e-14)
