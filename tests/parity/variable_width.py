"""Variable-width cases without tensors (arXiv 2606.18246): width schedules, what is refused, learning rates."""

from functools import partial
from pathlib import Path
from typing import Any

from scantling.costing import cost
from scantling.errors import InputError
from scantling.optim import learning_rate_factor
from scantling.recipe import AdamW, Power, TrainConfig
from scantling.resolve import spec_from
from scantling.shapes import Accounting, WidthProfile, continuous, published_widths
from scantling.spec import ModelSpec
from tests.parity.check import Case, Cases, Checks

SLOPES = ("bottleneck_ratio", "expansion_factor", "reduction_factor", "delta", "delta_neg")
FLAGS = {"original_input_width": True, "original_output_width": True, "wide_unembedding": False}
TRANSITIONS = {"move_up": "carry_forward", "move_up_gated": "gated"}  # the others have our names
BISECTION, COUNTS = 1e-9, 1e-9  # relative


def cases(path: Path, data: Any) -> Cases | None:
    """The cases of schedules.json or power_lr.json, or None."""
    match path.name, data:
        case "schedules.json", {"records": records}:
            errors = data.get("error_records", [])
            return (
                case
                for kind, check, entries in (("schedules", check_schedule, records), ("errors", check_error, errors))
                for case in (Case(kind, entry["id"], partial(check, entry)) for entry in entries)
            )
        case "power_lr.json", {"records": records}:
            return (Case("power_lr", entry["id"], partial(check_power, entry)) for entry in records)
    return None


def transition(config: dict[str, Any]) -> dict[str, Any]:
    """The transition of a spec from the authors' keys."""
    method = config.get("expand_method", "move_up")
    result: dict[str, Any] = {"kind": TRANSITIONS.get(method, method)}
    if method in ("linear", "linear_diff", "move_up_gated"):
        result["bias"] = config.get("expand_linear_bias", False)
    if method in ("linear", "linear_diff"):
        result["sinkhorn_iters"] = config.get("sinkhorn_iters", 0)
    if method == "interpolate":
        result["align_corners"] = config.get("interpolate_align_corners", False)
    return result


def profile_mapping(inputs: dict[str, Any]) -> dict[str, Any]:
    """The `width` section of a spec."""
    arithmetic = any(inputs.get(key) is not None for key in ("delta", "delta_neg"))
    geometric = any(inputs.get(key) is not None for key in SLOPES[:3])
    result = {
        "profile": "arithmetic" if arithmetic and not geometric else "geometric",
        "turn_layer": inputs["max_layer"],
        "symmetric": inputs.get("symmetric_widths", False),
        "duplicate_turn_layer": inputs.get("duplicate_max_layer", False),
        "quantize_to": inputs.get("quantize_to", 1),
        "permute": inputs.get("permute_widths_seed"),
        "permute_all": inputs.get("permute_all_widths", False),
        "match": "published",
        **{key: inputs[key] for key in (*SLOPES, "base_width") if inputs.get(key) is not None},
        **{key: inputs.get(key, default) for key, default in FLAGS.items()},
    }
    return {key: value for key, value in result.items() if value is not None}


def accounting(inputs: dict[str, Any]) -> Accounting:
    """What the authors' solver counts."""
    moe, width = inputs.get("moe"), inputs["hidden_size"]
    experts = moe["num_experts"] if moe else 0
    share = experts * moe["moe_intermediate_size"] / width if moe else 4.0
    return Accounting(
        inputs["vocab_size"],
        width,
        inputs["num_layers"],
        ffn=3 * share,
        down=share,
        experts=experts,
        chosen=moe["num_experts_per_tok"] if moe else 0,
        fixed_residual=inputs.get("fixed_residual_width", False),
    )


def base_mapping(inputs: dict[str, Any]) -> dict[str, Any]:
    """The keys of a spec that do not depend on the widths. Positions take no part in any count, and refuse odd heads."""
    moe = inputs.get("moe")
    ffn: dict[str, Any] = {"kind": "dense", "expansion": 4}
    if moe:
        expert = {"kind": "dense", "expansion": moe["moe_intermediate_size"] / inputs["hidden_size"]}
        ffn = {
            "kind": "moe",
            "num_local_experts": moe["num_experts"],
            "num_experts_per_tok": moe["num_experts_per_tok"],
            "expert": expert,
            "router_softmax": "after",
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.1,
        }
    return {
        "vocab_size": inputs["vocab_size"],
        "max_position_embeddings": inputs["max_position_embeddings"],
        "num_hidden_layers": inputs["num_layers"],
        "num_attention_heads": inputs["num_attention_heads"],
        "num_key_value_heads": inputs.get("num_key_value_heads") or inputs["num_attention_heads"],
        "ffn": ffn,
        "position": "none",
        "transition": transition(inputs),
    }


def profile_spec(inputs: dict[str, Any]) -> ModelSpec:
    """The spec as a user writes it: one width and a profile."""
    return spec_from({**base_mapping(inputs), "hidden_size": inputs["hidden_size"], "width": profile_mapping(inputs)})


def widths_of(inputs: dict[str, Any], **changes: Any) -> Any:
    """Every stage of the authors' schedule."""
    profile = WidthProfile.model_validate({**profile_mapping(inputs), **changes})
    return published_widths(profile, accounting(inputs), inputs.get("quantize_to", 1))


def explicit_spec(inputs: dict[str, Any], widths: list[int], **keys: Any) -> ModelSpec:
    """The spec with one width, head size and attention multiplier per layer."""
    mapping, heads = base_mapping(inputs), inputs["num_attention_heads"]
    head_dims = [width // heads for width in widths]
    mapping |= {"head_dim": head_dims, "attention_multiplier": [1 / size for size in head_dims], **keys}
    if inputs.get("fixed_residual_width"):
        ffn = {"kind": "dense", "intermediate_size": [4 * width for width in widths]}
        return spec_from({**mapping, "hidden_size": inputs["hidden_size"], "ffn": ffn})
    account = accounting(inputs)
    width_in, width_out = account.ends(WidthProfile.model_validate(profile_mapping(inputs)), widths)
    ends = {"embedding_size": width_in, "unembedding_size": width_out}
    return spec_from({**mapping, "hidden_size": list(widths), **ends})


def inner_size(layer: Any) -> int:
    """The FFN's, or one expert's, hidden size."""
    size: int = layer.ffn.expert.intermediate_size if layer.ffn.kind == "moe" else layer.ffn.intermediate_size
    return size


def check_schedule(record: dict[str, Any], checks: Checks) -> None:
    """Slopes, widths at every stage, the sizes that follow from them, and every count."""
    inputs = record["inputs"]
    found, account = widths_of(inputs), accounting(inputs)
    profile = WidthProfile.model_validate(profile_mapping(inputs))
    checks.equal("schedule_type", profile.profile, record["schedule_type"])
    names = {"geometric": SLOPES[1:3], "arithmetic": SLOPES[3:]}
    for kind, keys in names.items():
        for key, value in zip(keys, (found.slope.before, found.slope.after), strict=True):
            if kind == profile.profile:
                checks.close(key, value, record[key], relative=BISECTION)
            else:
                checks.equal(key, None, record[key])
    base = record.get("base_width_continuous")
    if base is not None:
        checks.close("base_width_continuous", found.base_continuous, base, relative=BISECTION)
    checks.equal("base_width", found.base, record["base_width"])
    unrounded = record["widths_before_quantization"]
    checks.close("widths_before_quantization", found.unrounded, unrounded, relative=BISECTION)
    step = inputs.get("quantize_to", 1)
    margin = min(abs(width - (int(width // step) + 0.5) * step) for width in found.unrounded)
    checks.close("rounding_margin", margin, record["rounding_margin"], absolute=BISECTION * max(unrounded))
    checks.equal("widths", found.widths, record["widths"])
    if "widths_without_base_rounding" in record:
        paper = widths_of(inputs, round_base=False)
        checks.equal("widths_without_base_rounding", paper.widths, record["widths_without_base_rounding"])
    _check_counts(record, profile, account, found, checks)
    _check_specs(record, checks)


def _check_counts(
    record: dict[str, Any], profile: WidthProfile, account: Accounting, found: Any, checks: Checks
) -> None:
    """The solver's own accounting: of the baseline, the unrounded and the final widths."""
    length = record["inputs"]["max_position_embeddings"]
    real = continuous(profile, account.depth, found.slope, found.base_continuous)
    uniform = [account.hidden_size] * account.depth
    for suffix, widths in (("baseline", uniform), ("continuous", real), ("quantized", found.widths)):
        got = {
            "matched_params": account.params(profile, widths),
            "forward_flops_per_sequence": account.forward_flops(profile, widths, length),
            "active_params": account.params(profile, widths, active=True),
        }
        for name, value in got.items():
            want = record.get(f"{name}_{suffix}")
            if want is not None:
                checks.close(f"{name}_{suffix}", value, want, relative=COUNTS)
    checks.close("mean_width", sum(found.widths) / account.depth, record["mean_width"], relative=COUNTS)
    if record.get("mean_width_continuous") is not None:
        checks.close(
            "mean_width_continuous", sum(real) / account.depth, record["mean_width_continuous"], relative=BISECTION
        )


def _check_specs(record: dict[str, Any], checks: Checks) -> None:
    """The resolved specs: from the profile, and from explicit widths."""
    inputs = record["inputs"]
    spec = explicit_spec(inputs, record["widths"])
    if not inputs.get("fixed_residual_width"):  # a profile varies the stream; this one varies what is inside the layers
        profiled = profile_spec(inputs)
        checks.equal("widths of the profile's spec", list(profiled.widths), record["widths"])
        ends = (profiled.embedding_size, profiled.unembedding_size)
        checks.equal("ends of the profile's spec", ends, (record["embedding_width"], record["unembedding_width"]))
    checks.equal("embedding_width", spec.embedding_size, record["embedding_width"])
    checks.equal("unembedding_width", spec.unembedding_size, record["unembedding_width"])
    checks.equal("head_dims", [layer.head_dim for layer in spec.layers], record["head_dims"])
    scales = [layer.scale for layer in spec.layers]
    checks.close("attention_multipliers", scales, record["attention_multipliers"], relative=1e-12)
    checks.equal("intermediate_sizes", [inner_size(layer) for layer in spec.layers], record["intermediate_sizes"])
    checks.equal("model_num_parameters", cost(spec).params["total"], record["model_num_parameters"])


def check_error(record: dict[str, Any], checks: Checks) -> None:
    """What the authors refuse, we refuse with a message."""
    inputs = record["inputs"]
    try:
        if inputs.get("fixed_residual_width"):
            explicit_spec(inputs, widths_of(inputs).widths)
        else:
            profile_spec(inputs)
        checks.faults.append(f"accepted, expected {record['raises']}: {record['why']}")
    except (InputError, ValueError) as error:
        checks.equal("message is given", bool(str(error)), True)


def check_power(record: dict[str, Any], checks: Checks) -> None:
    """Their step n (0-based, learning rate 0 at n = 0) is our step n - 1; the first group's rate is the peak."""
    rates = [record["base_lr"] * multiplier for multiplier in record["group_lr_multipliers"]]
    steps = record["num_training_steps"]
    warm = (record["num_warmup_steps"] - 0.5) / steps  # ours rounds up to whole steps
    config = TrainConfig(
        tokens=steps * record["c"],
        batch_tokens=record["c"],
        sequence_length=1,
        optimizer=AdamW(learning_rate=rates[0]),
        schedule=Power(kind="power", warmup=warm, a=record["a"], exponent=record["b"]),
    )
    got = [learning_rate_factor(config, step - 1) for step in record["steps"]]
    checks.close("factor", got, record["factor"], relative=COUNTS)
    for step, want in record["lr_by_group_first_steps"].items():
        factor = learning_rate_factor(config, int(step) - 1)
        checks.close(f"rates at step {step}", [rate * factor for rate in rates], want, relative=COUNTS)
