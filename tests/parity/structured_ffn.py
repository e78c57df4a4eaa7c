"""Structured feed-forward cases (arXiv 2406.16450): linears, FFNs, guidance, initialisation, costs, schedules, sizes.

float64 within 1e-6 of the largest value, float32 within 2e-4, as the recorded cases' notes suggest.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scantling.costing import cost, total, train_flops
from scantling.errors import InputError
from scantling.guidance import guidance, guide_params, guide_weight
from scantling.model import build
from scantling.model.ffn import BlockDenseLinear, BlockShuffleLinear, LowRankLinear
from scantling.model.guided import GuidedLinear
from scantling.model.init import polar, spectral_factors
from scantling.optim import learning_rate_factor
from scantling.recipe import Cosine, SelfGuided, TrainConfig
from scantling.resolve import spec_from
from scantling.rows import ffn_weights
from scantling.spec import ModelSpec
from tests.parity.check import Case, Cases, Checks, Tensors, copy_in

TOLERANCE = {"float64": 1e-6, "float32": 2e-4}
KINDS = {"lowrank": "low_rank", "blockshuffle": "block_shuffle", "blockdense": "block_dense", "linear": "dense"}
ALPHA = 1e-6  # recorded in float32
FACTORS = {
    "lowrank": {"lr1": "down.weight", "lr2": "up.weight", "bias": "up.bias"},
    "blockshuffle": {"blkdiag1": "down.weight", "blkdiag2": "up.weight", "bias": "bias"},
    "blockdense": {"blkdiag": "down.weight", "lr": "up.weight", "bias": "up.bias"},
}
Structured = LowRankLinear | BlockShuffleLinear | BlockDenseLinear


def cases(path: Path, data: Any) -> Cases | None:
    """The cases of a file of this format, or None."""
    match path.name, data:
        case "cases.json", list() | {"cases": list()}:
            entries = data if isinstance(data, list) else data["cases"]
            return (
                Case(entry["kind"], entry["name"], partial(TENSOR_KINDS[entry["kind"]], entry, path.parent))
                if entry["kind"] in TENSOR_KINDS
                else Case(entry["kind"], entry["name"], _unknown)
                for entry in entries
            )
        case "costs.json", _:
            return (Case("costs", f"{at}", partial(check_cost, entry)) for at, entry in enumerate(data))
        case "invalid.json", _:
            return (Case("sizes", _sizes(entry), partial(check_sizes, entry)) for entry in data)
        case "schedules.json", {"alpha": _} | {"lr": _}:
            return _schedules(data)
    return None


def _unknown(checks: Checks) -> None:
    checks.faults.append("a kind of case this runner does not know")


def _sizes(entry: dict[str, Any]) -> str:
    return " ".join(f"{key}={entry[key]}" for key in ("structure", "N", "M", "R", "B") if entry.get(key) is not None)


def structured(entry: dict[str, Any], bias: bool) -> Structured:
    """The linear a case names."""
    n, m, r, b = (entry.get(key) for key in ("N", "M", "R", "B"))
    match entry["structure"]:
        case "lowrank":
            return LowRankLinear(n, m, r, bias)
        case "blockshuffle":
            return BlockShuffleLinear(n, m, b, bias)
        case "blockdense":
            return BlockDenseLinear(n, m, r, b, bias)
    raise ValueError(f"no structure {entry['structure']}")


def named(entry: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded names to ours: one linear, or `fc1.` and `fc2.` of an FFN."""
    names = FACTORS[entry["structure"]]
    first = "gate_up_proj" if entry.get("activation") == "swiglu" else "up_proj"
    parts = {"fc1": first, "fc2": "down_proj"}
    result = {}
    for name, value in tensors.items():
        *prefix, last = name.split(".")
        result[".".join([*(parts[part] for part in prefix), names[last]])] = value
    return result


def _guided_names(entry: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    guide = {"guide": tensors["guide_linear"]} if "guide_linear" in tensors else {}
    rest = named(entry, {name: value for name, value in tensors.items() if name != "guide_linear"})
    return guide | {f"structured.{name}": value for name, value in rest.items()}


def _compare_gradients(module: nn.Module, expected: dict[str, Tensor], tolerance: float, checks: Checks) -> None:
    got = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    checks.equal("parameters with a gradient", sorted(got), sorted(expected))
    for name in got.keys() & expected.keys():
        checks.close(f"gradient of {name}", got[name], expected[name], relative=tolerance)


def _run_module(module: nn.Module, stored: Tensors, tolerance: float, checks: Checks, **call: Any) -> None:
    """Output, and gradient of the input, of one call."""
    x = stored["input"].clone().requires_grad_(True)
    output = module(x, **call)
    (output * stored["grad_output"]).sum().backward()
    checks.close("output", output, stored["output"], relative=tolerance)
    checks.close("gradient of the input", x.grad, stored["grad_input"], relative=tolerance)


def check_linear(entry: dict[str, Any], folder: Path, checks: Checks) -> None:
    """A structured linear: output, gradients, merged matrix."""
    stored, tolerance = Tensors(folder / entry["file"]), TOLERANCE[entry["dtype"]]
    module = structured(entry, entry["bias"]).to(getattr(torch, entry["dtype"]))
    copy_in(module, named(entry, stored.all("weights.")), checks)
    _run_module(module, stored, tolerance, checks)
    _compare_gradients(module, named(entry, stored.all("grad.")), tolerance, checks)
    checks.close("merged", module.merge(), stored["merged"], relative=tolerance)
    stored.check_all_used(checks)


def check_guided(entry: dict[str, Any], folder: Path, checks: Checks) -> None:
    """A structured linear with its dense guide, at one alpha and draw."""
    stored, tolerance = Tensors(folder / entry["file"]), TOLERANCE[entry["dtype"]]
    module = GuidedLinear(structured(entry, entry["bias"]), entry["stochastic"]).to(getattr(torch, entry["dtype"]))
    copy_in(module, _guided_names(entry, stored.all("weights.")), checks)
    module.alpha = entry["alpha"]
    checks.equal("guide is used", module.guided(entry["u"]), entry["guide_active"])
    _run_module(module, stored, tolerance, checks, draw=entry["u"])
    _compare_gradients(module, _guided_names(entry, stored.all("grad.")), tolerance, checks)
    checks.close("merged", module.merge(), stored["merged"], relative=tolerance)
    stored.check_all_used(checks)


def ffn_spec(structure: str, hidden: int, inner: int, swiglu: bool, bias: bool, **sizes: Any) -> dict[str, Any]:
    """The `ffn` of a spec: tanh GELU, or SwiGLU."""
    given = {name: size for name, size in sizes.items() if size is not None}
    wanted = {"lowrank": ("rank",), "blockshuffle": ("num_blocks",), "blockdense": ("rank", "num_blocks"), "linear": ()}
    act = "silu" if swiglu else "gelu_pytorch_tanh"
    return {
        "kind": KINDS[structure],
        "gated": swiglu,
        "hidden_act": act,
        "intermediate_size": inner,
        "bias": bias,
        **{name: given[name] for name in wanted[structure]},
    }


def _one_layer(hidden: int, ffn: dict[str, Any]) -> ModelSpec:
    base = {"vocab_size": 2, "hidden_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 1}
    return spec_from({**base, "position": "none", "ffn": ffn})


def check_ffn(entry: dict[str, Any], folder: Path, checks: Checks) -> None:
    """A whole FFN through the spec: output, gradients, merged matrices."""
    stored, tolerance = Tensors(folder / entry["file"]), TOLERANCE[entry["dtype"]]
    hidden, inner, swiglu = entry["hidden"], entry["ffn_dim"], entry["activation"] == "swiglu"
    sizes = {"rank": entry["R"], "num_blocks": entry["B"]}
    spec = _one_layer(hidden, ffn_spec(entry["structure"], hidden, inner, swiglu, entry["bias"], **sizes))
    module = build(spec).layers[0].mlp.to(getattr(torch, entry["dtype"]))
    copy_in(module, named(entry, stored.all("weights.")), checks)
    _run_module(module, stored, tolerance, checks)
    _compare_gradients(module, named(entry, stored.all("grad.")), tolerance, checks)
    first = module.gate_up_proj if swiglu else module.up_proj
    checks.close("merged.fc1", first.merge(), stored["merged.fc1"], relative=tolerance)
    checks.close("merged.fc2", module.down_proj.merge(), stored["merged.fc2"], relative=tolerance)
    stored.check_all_used(checks)


@torch.no_grad()
def check_init(entry: dict[str, Any], folder: Path, checks: Checks) -> None:
    """Spectral and orthonormal starts from the recorded draws; guidance starts from the true merged matrix."""
    stored, tolerance = Tensors(folder / entry["file"]), TOLERANCE[entry["dtype"]]
    module = structured(entry, "weights.bias" in stored).to(getattr(torch, entry["dtype"]))
    copy_in(module, named(entry, _without_guide(stored)), checks)
    if isinstance(module, LowRankLinear):
        recorded = [torch.linalg.svdvals(factor.weight) for factor in (module.down, module.up)]
        spectral_factors(stored["gaussian_dense"], module.up.weight, module.down.weight)
        for factor, want in zip((module.down, module.up), recorded, strict=True):
            checks.close("singular values of a factor", torch.linalg.svdvals(factor.weight), want, relative=tolerance)
    else:
        for name, draw in named(entry, stored.all("gaussian.")).items():
            weight = module.get_parameter(name)
            checks.close(f"polar factor {name}", polar(draw), weight, relative=tolerance)
            weight.copy_(polar(draw))
    checks.close("merged", module.merge(), stored["merged"], relative=tolerance)
    if "weights.bias" in stored:
        checks.equal("largest bias", float(stored["weights.bias"].abs().max()), 0.0)
    guide = GuidedLinear(module).guide
    checks.close("first guide = merged", guide, stored["merged"], relative=tolerance)
    theirs = stored["weights.guide_linear"]
    checks.close(
        "authors' first guide, distance to merged",
        (theirs - guide).norm() / guide.norm(),
        entry["official_W0_relative_difference_to_merged"],
        absolute=tolerance,
    )
    stored.check_all_used(checks)


def _without_guide(stored: Tensors) -> dict[str, Tensor]:
    return {name: value for name, value in stored.all("weights.").items() if name != "guide_linear"}


def check_trajectory(entry: dict[str, Any], folder: Path, checks: Checks) -> None:
    """Several AdamW steps through the guided phase and beyond."""
    stored, tolerance, given = Tensors(folder / entry["file"]), TOLERANCE[entry["dtype"]], entry["optimizer"]
    module = GuidedLinear(structured(entry, entry["bias"]), entry["stochastic"]).to(getattr(torch, entry["dtype"]))
    copy_in(module, _guided_names(entry, stored.all("weights.step0.")), checks)
    theirs = {ours: name for name in entry["weight_meaning"] for ours in _guided_names(entry, {name: torch.empty(0)})}
    settings = {name: given[name] for name in ("lr", "weight_decay", "betas", "eps")}
    optimizer = torch.optim.AdamW(module.parameters(), **settings)
    for step, log in enumerate(entry["log"]):
        alpha, guided = guide_weight(step, entry["guided_steps"]), step < entry["guided_steps"]
        module.alpha = alpha if guided else None
        checks.close(f"alpha at step {step}", alpha, log["alpha"], absolute=tolerance)
        checks.equal(f"guided phase at step {step}", guided, log["guided_phase"])
        checks.equal(f"guide is used at step {step}", module.guided(log["u"]), log["guide_active"])
        loss = (module(stored["input"], draw=log["u"]) - stored["target"]).square().mean()
        loss.backward()
        missing = sorted(theirs[name] for name, p in module.named_parameters() if p.grad is None)
        checks.equal(f"without gradient at step {step}", missing, sorted(log["params_without_grad"]))
        norm = nn.utils.clip_grad_norm_(module.parameters(), given["clip_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        checks.close(f"loss at step {step}", loss, log["loss"], relative=tolerance)
        checks.close(f"gradient norm at step {step}", norm, log["grad_norm_before_clip"], relative=tolerance)
        for name, want in _guided_names(entry, stored.all(f"weights.step{step + 1}.")).items():
            checks.close(f"{name} after {step + 1} steps", module.get_parameter(name), want, relative=tolerance)
    stored.check_all_used(checks)


def check_sizes(entry: dict[str, Any], checks: Checks) -> None:
    """The linear is built or refused as the authors' is; a refused one is refused inside a spec too."""
    try:
        structured(entry, False)
        checks.equal("outcome", "accepted", entry["official"])
    except ValueError:
        checks.equal("outcome", "rejected", entry["official"])
    if entry["official"] == "rejected":
        sizes = {"rank": entry["R"], "num_blocks": entry["B"]}
        try:
            _one_layer(entry["N"], ffn_spec(entry["structure"], entry["N"], entry["M"], False, False, **sizes))
            checks.faults.append("a spec with these sizes is accepted")
        except InputError:
            pass


def model_spec(config: dict[str, Any]) -> ModelSpec:
    """The small model of a cost case."""
    layers, method = config["L"], config["method"]
    swiglu, bias = config.get("act") == "swiglu", config.get("bias", True)
    sizes = {"rank": config.get("rank"), "num_blocks": config.get("nblocks")}
    first = "linear" if config.get("first_dense", True) else method
    ffns = [
        ffn_spec(structure, config["hidden"], config["ffn"], swiglu, bias, **sizes)
        for structure in [first, *[method] * (layers - 1)]
    ]
    return spec_from(
        {
            "vocab_size": config["V"],
            "max_position_embeddings": config["seq"],
            "hidden_size": config["hidden"],
            "num_hidden_layers": layers,
            "num_attention_heads": config["q"],
            "num_key_value_heads": config["kv"],
            "head_dim": config["attn"] // config["q"],
            "attention_bias": bias,
            "position": "none",
            "norm": "rms_norm" if config.get("ln") == "rmsnorm" else {"kind": "layer_norm"},
            "tie_word_embeddings": True,
            "per_layer_config": {at: {"ffn": ffn} for at, ffn in enumerate(ffns)},
        }
    )


def check_cost(entry: dict[str, Any], checks: Checks) -> None:
    """Counts and FLOPs as sums of rows; a guided run's through its plan."""
    config, guided = entry["config"], entry["config"].get("guided")
    spec, length, batch = model_spec(config), config["seq"], config["seq"] * config["gb"]
    found = cost(spec)
    guide = None
    if guided:
        mode = {"fixedstep": "fixed_tokens", "fixedflop": "fixed_flops"}[guided["mode"]]
        guide = SelfGuided(mode=mode, ratio=guided["ratio"], stochastic=guided["reduce"])
    train = TrainConfig(tokens=config["steps"] * batch, batch_tokens=batch, sequence_length=length, guide=guide)
    plan = guidance(spec, train)
    weights = [ffn_weights(layer.ffn, config["hidden"]) for layer in spec.layers]
    got = {
        "parameters_total": found.params["total"],
        "parameters_guide": guide_params(spec) if plan else 0,
        "ffn_weight_parameters": sum(weights),
        "per_layer_ffn_parameters": weights,
        "weight_parameters_with_embedding": total(found.rows, "matmul_flops") // 2,
        "forward_flops_per_step": found.flops_per_token["forward"] * batch,
        "guide_flops_per_forward_step": plan.guide_flops * batch if plan else 0,
        "total_steps": plan.steps if plan else train.steps,
        "guided_steps": plan.guided_steps if plan else 0,
    }
    for key, value in got.items():
        checks.equal(key, value, entry[key])
    training = plan.train_flops() if plan else train_flops(spec, length, train.steps * batch)
    checks.close("total_training_flops", training, entry["total_training_flops"], relative=1e-12)


def _schedules(data: dict[str, Any]) -> Cases:
    for entry in data.get("alpha", []):
        name = f"{entry['shape']} over {entry['guided_steps']} steps"
        yield Case("alpha", name, partial(check_alpha, entry))
    for entry in data.get("lr", []):
        yield Case("lr", f"peak {entry['peak']} over {entry['total_steps']} steps", partial(check_lr, entry))


def check_alpha(entry: dict[str, Any], checks: Checks) -> None:
    """The guide's weight at every step."""
    want = entry["alpha_at_step"]
    got = [guide_weight(step, entry["guided_steps"], entry["shape"]) for step in range(len(want))]
    checks.close("alpha", got, want, absolute=ALPHA)


def check_lr(entry: dict[str, Any], checks: Checks) -> None:
    """Their cosine would reach its floor one step after the last, so it is ours over one step more."""
    steps, warm = entry["total_steps"] + 1, math.floor(entry["warmup_fraction"] * entry["total_steps"])
    share = (warm - 0.5) / steps if warm else 0.0  # ours rounds up to whole steps
    schedule = Cosine(kind="cosine", warmup=share, final=entry["min_lr"] / entry["peak"])
    config = TrainConfig(tokens=steps, batch_tokens=1, sequence_length=1, schedule=schedule)
    got = [entry["peak"] * learning_rate_factor(config, step) for step in range(len(entry["lr_at_step"]))]
    checks.close("learning rate", got, entry["lr_at_step"], relative=1e-6)


TENSOR_KINDS = {
    "linear": check_linear,
    "guided": check_guided,
    "ffn": check_ffn,
    "init": check_init,
    "trajectory": check_trajectory,
}
