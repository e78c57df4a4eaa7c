"""Variable-width cases with tensors: the residual stream, whole models, initial spreads and parameter groups."""

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scantling.model import Decoder, build, build_meta
from scantling.model.ffn import MixtureOfExperts
from scantling.model.init import spreads
from scantling.model.stream import Resize, Stream, sinkhorn
from scantling.optim import parameter_groups
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from tests.parity import variable_width as schedules
from tests.parity.check import Case, Cases, Checks, Tensors, copy_in

STATES, LOSS, AUXILIARY = 2e-5, 1e-5, 1e-4  # absolute
GRADIENT, GRADIENT_FLOOR = 1e-3, 1e-8  # of a tensor's largest value; absolute
STD = 1e-9  # relative
MODEL_KEYS = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0, "rms_norm_eps": 1e-5}
RULES = (
    (r"embed\.", "embed_tokens."),
    (r"ln_f\.", "norm."),
    (r"layers\.(\d+)\.norm1\.", r"layers.\1.input_layernorm."),
    (r"layers\.(\d+)\.norm2\.", r"layers.\1.post_attention_layernorm."),
    (r"layers\.(\d+)\.attn\.([qkvo])\.", r"layers.\1.self_attn.\2_proj."),
    (r"layers\.(\d+)\.mlp\.(up|gate|down)\.", r"layers.\1.mlp.\2_proj."),
    (r"layers\.(\d+)\.moe\.router\.", r"layers.\1.mlp.gate."),
    (r"layers\.(\d+)\.moe\.(up|gate|down)\.", r"layers.\1.mlp.experts.*.\2_proj."),
    (r"expand\.(\w+)_for_layer(\d+)\.", r"resize.\2.\1."),
    (r"expand\.(\w+)_for_unembed\.", r"resize_last.\1."),
)


def cases(path: Path, data: Any) -> Cases | None:
    """The cases of resize.json, models.json or init_and_groups.json, or None."""
    match path.name, data:
        case "resize.json", {"cases": entries}:
            return (Case(entry["kind"], entry["id"], partial(check_resize, entry, path)) for entry in entries)
        case "models.json", {"cases": entries}:
            return (Case("models", entry["id"], partial(check_model, entry, path)) for entry in entries)
        case "init_and_groups.json", {"models": entries}:
            return (Case("init", name, partial(check_init, name, table, path)) for name, table in entries.items())
    return None


def ours(name: str) -> str:
    """Our name of a recorded parameter; `*` where the recorded tensor stacks all experts."""
    for pattern, replacement in RULES:
        if re.match(pattern, name):
            return re.sub("^" + pattern, replacement, name)
    return name


def unstacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Recorded tensors under our names, experts one by one."""
    result = {}
    for name, value in tensors.items():
        target = ours(name)
        if "*" in target:
            result |= {target.replace("*", str(expert)): part for expert, part in enumerate(value)}
        else:
            result[target] = value
    return result


def model_spec(config: dict[str, Any], widths: list[int], rope_theta: float = 10000.0) -> ModelSpec:
    """A whole model at these widths, with the constants all recorded models share."""
    initial = {
        "kind": "mup",
        "std": 0.1,
        "m_width": 8,
        "variable": config.get("variable_initialization", True),
        "base_width": config["hidden_size"],
    }
    position = {"kind": "rope", "rope_theta": rope_theta}
    return schedules.explicit_spec(config, widths, **MODEL_KEYS, position=position, initialization=initial)


def check_model(case: dict[str, Any], path: Path, checks: Checks) -> None:
    """Sizes, states, logits, losses and gradients of a tiny model."""
    config = case["config"]
    stored = Tensors(path.with_suffix(".safetensors"), f"{case['id']}/")
    checks.equal("widths", schedules.widths_of(config).widths, case["widths"])
    spec = model_spec(config, case["widths"], case["rope_theta"])
    checks.equal("embedding_width", spec.embedding_size, case["embedding_width"])
    checks.equal("unembedding_width", spec.unembedding_size, case["unembedding_width"])
    sizes = [schedules.inner_size(layer) for layer in spec.layers]
    checks.equal("intermediate_sizes", sizes, case["intermediate_sizes"])
    scales = [layer.scale for layer in spec.layers]
    checks.close("attention_multipliers", scales, case["attention_multipliers"], relative=1e-12)
    model = build(spec).train()
    checks.equal("num_parameters", sum(p.numel() for p in model.parameters()), case["num_parameters"])
    copy_in(model, unstacked(stored.all("weight.")), checks)
    states: dict[str, Tensor] = {}
    ids = stored["input_ids"]
    logits = model(ids)
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _m, args, at=index: states.update({f"resized.{at}": args[0]}))
        layer.register_forward_hook(lambda _m, _args, out, at=index: states.update({f"hidden.{at}": out}))
    labels = torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -1)), dim=1)
    loss = model.loss(ids, labels)
    for name, state in states.items():
        checks.close(name, state, stored[name], absolute=STATES)
    checks.close("logits", logits, stored["logits"], absolute=STATES)
    checks.close("loss", loss, stored["loss"], absolute=LOSS)
    auxiliary = sum(module.auxiliary for module in model.modules() if isinstance(module, MixtureOfExperts))
    checks.close("aux_loss", auxiliary, stored["aux_loss"], absolute=AUXILIARY)
    if case.get("grads"):
        loss.backward()
        _check_gradients(model, stored.all("grad."), set(stored.all("weight.")), checks)
    stored.check_all_used(checks)


def _check_gradients(model: Decoder, recorded: dict[str, Tensor], names: set[str], checks: Checks) -> None:
    """Each recorded gradient; parameters without a record got none, or exact zeros."""
    for name in sorted(names):
        target = ours(name)
        if "*" in target:
            experts = range(model.spec.layers[int(name.split(".")[1])].ffn.num_local_experts)
            parts = [model.get_parameter(target.replace("*", str(expert))) for expert in experts]
            got = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parts])
        else:
            parameter = model.get_parameter(target)
            got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name in recorded:
            checks.close(f"gradient of {name}", got, recorded[name], absolute=GRADIENT_FLOOR, relative=GRADIENT)
        else:
            checks.equal(f"no gradient of {name}", float(got.abs().max()), 0.0)


class AddFixed(nn.Module):
    """The stand-in for a block: adds a recorded tensor."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, x: Tensor, past: object = None, documents: None = None) -> Tensor:
        return x + self.delta

    def update(self, x: Tensor, past: object = None) -> None:
        x.add_(self.delta)


def check_resize(case: dict[str, Any], path: Path, checks: Checks) -> None:
    """One pass along the stream, one change of width, or one Sinkhorn balancing."""
    stored = Tensors(path.with_suffix(".safetensors"), f"{case['id']}/")
    if case["kind"] == "stream":
        _check_stream(case, stored, checks)
    elif case["kind"] == "resize":
        _check_one_resize(case, stored, checks)
    elif case["kind"] == "sinkhorn":
        checks.close("W", sinkhorn(stored["M"], case["n_iters"]), stored["W"], absolute=STATES)
    else:
        checks.faults.append(f"a kind of case this runner does not know: {case['kind']}")
    stored.check_all_used(checks)


def stream_spec(case: dict[str, Any]) -> ModelSpec:
    """A model with these widths; its blocks will be replaced."""
    return spec_from(
        {
            "vocab_size": 2,
            "num_hidden_layers": len(case["widths"]),
            "hidden_size": case["widths"],
            "num_attention_heads": 1,
            "head_dim": 2,
            "intermediate_size": 1,
            "rms_norm_eps": case["layer_norm_epsilon"],
            "transition": schedules.transition(case),
            "embedding_size": case["embedding_width"],
            "unembedding_size": case["unembedding_width"],
        }
    )


@torch.no_grad()
def _check_stream(case: dict[str, Any], stored: Tensors, checks: Checks) -> None:
    model = build(stream_spec(case))
    model.layers = nn.ModuleList(AddFixed(stored[f"delta.{at}"]) for at in range(len(case["widths"])))
    model.embed_tokens = model.lm_head = nn.Identity()
    weights = {"norm.weight": stored["ln_f.weight"]}
    weights |= {ours("expand." + name): value for name, value in stored.all("expand.").items()}
    copy_in(model, weights, checks)
    states: dict[str, Tensor] = {}
    for at, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda _m, args, at=at: states.update({f"resized.{at}": args[0]}))
        layer.register_forward_hook(lambda _m, _args, out, at=at: states.update({f"hidden.{at}": out}))
    model.norm.register_forward_hook(lambda _m, _args, out: states.update(ln_f_out=out))
    if "forward_seed" in case:
        torch.manual_seed(case["forward_seed"])
    with torch.enable_grad():  # the copying path, as in training
        states["output"] = model(stored["x0"])
    for name, state in states.items():
        checks.close(name, state.detach(), stored[name], absolute=STATES)
    if "forward_seed" not in case:  # and the path without gradients, in place where that is exact
        checks.close("output", model(stored["x0"]), stored["output"], absolute=STATES)


@torch.no_grad()
def _check_one_resize(case: dict[str, Any], stored: Tensors, checks: Checks) -> None:
    """The candidates are the states so far, newest first: replayed oldest first into a stream."""
    x, stream = stored["x"], Stream()
    states = [*reversed([stored[f"candidate.{at}"] for at in range(len(case["candidate_widths"]))]), x]
    for state, after in pairwise(states):
        if after.shape[-1] < state.shape[-1]:
            stream.narrow(state, after.shape[-1])
        elif after.shape[-1] > state.shape[-1]:
            stream.carried(state, after.shape[-1])
    whole = {"widths": [2], "layer_norm_epsilon": 1e-5, "embedding_width": 2, "unembedding_width": 2}
    module = Resize(stream_spec({**case, **whole}).transition, case["in_dim"], case["out_dim"])
    weights = {ours("expand." + name): value for name, value in stored.all("expand.").items()}
    copy_in(module, {name.split(".", 2)[-1]: value for name, value in weights.items()}, Checks())
    if any(True for _ in module.parameters()) and not weights:
        checks.faults.append("a learned map without recorded weights")
    if "forward_seed" in case:
        torch.manual_seed(case["forward_seed"])
    checks.close("y", module(x, stream), stored["y"], absolute=STATES)


def check_init(name: str, table: dict[str, Any], path: Path, checks: Checks) -> None:
    """Standard deviation and group of every parameter, of a model that another file of the folder describes."""
    spec = _known_model(name, path.parent)
    model = build_meta(spec)
    found = spreads(model, spec)
    groups = {own: group for group, members in parameter_groups(model).items() for own in members}
    shapes = {own: list(parameter.shape) for own, parameter in model.named_parameters()}
    expected = set()
    for recorded, want in table.items():
        target, shape = ours(recorded), want["shape"]
        if "*" in target:
            targets = [target.replace("*", str(expert)) for expert in range(shape[0])]
            shape = shape[1:]
        else:
            targets = [target]
        for own in targets:
            if own not in shapes:
                checks.faults.append(f"no parameter {own}")
                continue
            expected.add(own)
            checks.equal(f"shape of {own}", shapes[own], shape)
            checks.equal(f"group of {own}", groups[own], want["group"])
            if want["std"] is None:
                checks.equal(f"drawn from a normal: {own}", own in found, False)
            else:
                checks.close(f"std of {own}", found.get(own, 0.0), want["std"], relative=STD)
    checks.equal("all parameters are listed", sorted(shapes.keys() - expected), [])


def _known_model(name: str, folder: Path) -> ModelSpec:
    models, records = folder / "models.json", folder / "schedules.json"
    if models.exists():
        for case in json.loads(models.read_text(encoding="utf-8"))["cases"]:
            if case["id"] == name:
                return model_spec(case["config"], case["widths"], case["rope_theta"])
    if records.exists():
        for record in json.loads(records.read_text(encoding="utf-8"))["records"]:
            if record["id"] == name:
                return model_spec(record["inputs"], record["widths"])
    raise ValueError(f"neither models.json nor schedules.json beside it describes {name}")
