"""Optimizers and learning-rate schedules: torch's own, set up from a run's configuration."""

import math

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from scantling.parts import MuPInit
from scantling.recipe import (
    WSD,
    AdamW,
    Constant,
    Cosine,
    LinearDecay,
    MatrixDivisor,
    Muon,
    MuP,
    Power,
    TrainConfig,
)
from scantling.spec import ModelSpec

TABLES = ("embed_tokens.", "embed_positions.")  # looked up, not multiplied; a tied head is its table
BETWEEN = ("resize", "branches.entries")  # maps between widths, outside the layers


# --- what learns how fast ------------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The three groups of the ><former's recipe (arXiv 2606.18246, section 4), parameters by name.

    `mup` (learning rate / m_width, weight decay): the layers' matrices; `normal` (full rate, weight decay): tables, head,
    maps of transitions and branches; `no_weight_decay` (full rate): norm gains and shifts, biases, mixing weights.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"mup": {}, "normal": {}, "no_weight_decay": {}}
    for name, parameter in model.named_parameters():
        if name.startswith(BETWEEN):
            group = "normal"
        elif parameter.ndim < 2:
            group = "no_weight_decay"
        else:
            group = "mup" if name.startswith("layers.") else "normal"
        groups[group][name] = parameter
    return groups


def rate_multiplier(name: str, parameter: nn.Parameter, config: TrainConfig, layer_matrix: bool) -> float:
    """What a parameter's peak learning rate is of the optimizer's, by the run's `parametrization`.

    MuP: base_hidden_size / fan_in for every matrix between activations whose widths grow: those of the layers, and the maps
    of transitions and branches. fan_in is the last dimension: of a block-diagonal stack one block's inputs, of an expert's
    or a low-rank factor's matrix its own.

    Args:
        layer_matrix: the parameter is in the `mup` group of `parameter_groups`.
    """
    match config.parametrization:
        case MuP(base_hidden_size=base):
            between = parameter.ndim >= 2 and name.startswith(BETWEEN)
            return base / parameter.shape[-1] if layer_matrix or between else 1.0
        case MatrixDivisor(m_width=m_width):
            return 1 / m_width if layer_matrix else 1.0
    return 1.0


def decays(name: str, parameter: nn.Parameter, config: TrainConfig) -> bool:
    """Whether weight decay acts on a parameter, by the run's `weight_decay_on`.

    MatrixDivisor counts the biases of transitions and branches as part of their matrices, as `parameter_groups` does.
    """
    rule = config.weight_decay_on
    if rule == "all":
        return True
    whole = isinstance(config.parametrization, MatrixDivisor) and name.startswith(BETWEEN)
    return (parameter.ndim >= 2 or whole) and not (rule == "matrices_without_tables" and name.startswith(TABLES))


def mup_logits_scaling(spec: ModelSpec, mup: MuP) -> float:
    """What logits must be divided by when the head learns at the full rate: its input width over the base width."""
    return spec.unembedding_size / mup.base_hidden_size


def lacking_for_mup(spec: ModelSpec, config: TrainConfig, head_sizes_grow: bool = False) -> list[str]:
    """What a run with `parametrization: mup` still lacks for muP (arXiv 2203.03466, table 8), in sentences.

    Args:
        head_sizes_grow: larger models will have larger heads instead of more of them.
    """
    mup, init = config.parametrization, spec.initialization
    if not isinstance(mup, MuP):
        return []
    base, found = mup.base_hidden_size, []
    wanted = mup_logits_scaling(spec, mup)
    if not math.isclose(spec.logits_scaling, wanted):
        found.append(
            f"muP divides logits by unembedding_size / base_hidden_size: expected logits_scaling {wanted:g}, "
            f"got {spec.logits_scaling:g}"
        )
    if not isinstance(init, MuPInit) or init.base_width is None or not init.variable:
        problem = {
            "fan_in": "fan_in lets those of tables shrink",
            "normal": "normal keeps those of matrices",
            "mup": "mup without base_width, or with variable: false, keeps those of matrices",
        }[init.kind]
        found.append(
            "muP's initial weights fall as 1/sqrt(width) in matrices and stay in tables, but "
            f"{problem}: use initialization: {{kind: mup, std: {base**-0.5:.4g}, m_width: 1, base_width: {base}}}"
        )
    products = [layer.scale * layer.head_dim for layer in spec.layers]
    plain = all(layer.attention_multiplier is None for layer in spec.layers)
    if max(products) > 1.01 * min(products) or (head_sizes_grow and plain):
        found.append(
            "muP multiplies attention scores by c / head_dim with one c: set attention_multiplier where head sizes differ"
        )
    return found


# --- optimizers ----------------------------------------------------------------------------------------------------------


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The run's optimizer, or for Muon two: Muon itself and AdamW.

    Every param group carries `base_lr`, its peak rate; a step's rate is base_lr x `learning_rate_factor`. Groups differ by
    rate and weight decay:

    - weight decay acts where `weight_decay_on` says. torch multiplies it by the group's rate. Under MuP it is divided by
      the rate's multiplier, so that a step shrinks every matrix by the same share whatever its width, as the authors'
      package (microsoft/mup, MuAdamW) does; under MatrixDivisor it is the same number everywhere, as in the ><former's code.
    - Muon takes the layers' 2-D matrices (routers and low-rank factors too). torch's takes nothing else, so stacks of
      matrices (block-diagonal factors, stacked experts) go to AdamW with tables, head, transitions and vectors.

    AdamW and SGD are torch's fused ones (but SGD of sharded parameters, for which torch has no fused rule). SGD's momentum
    starts as zeros: the same as torch's first step, and right too when that step is skipped, where torch would leave the
    buffer uninitialised.

    Args:
        model: its parameters by name decide the groups; wrapped models (DDP, FSDP) must keep the decoder's names.
        config: with `parametrization` only AdamW comes here (TrainConfig refuses the others).
    """
    optimizer = config.optimizer
    groups = parameter_groups(model)
    everything = dict(model.named_parameters())
    if isinstance(optimizer, Muon):
        matrices = {name: p for name, p in groups["mup"].items() if p.ndim == 2}
        rest = {name: p for name, p in everything.items() if name not in matrices}
        return [
            torch.optim.Muon(
                _grouped(matrices, config, optimizer.matrix_learning_rate, groups["mup"]),
                momentum=optimizer.momentum,
                nesterov=optimizer.nesterov,
                ns_steps=optimizer.ns_steps,
                adjust_lr_fn=optimizer.adjust,
            ),
            _adamw(_grouped(rest, config, optimizer.learning_rate, groups["mup"]), optimizer),
        ]
    found = _grouped(everything, config, optimizer.learning_rate, groups["mup"])
    if isinstance(optimizer, AdamW):
        return [_adamw(found, optimizer)]
    sgd = torch.optim.SGD(
        found,
        lr=optimizer.learning_rate,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        fused=not any(hasattr(parameter, "device_mesh") for parameter in everything.values()),  # DTensors
    )
    if optimizer.momentum:
        for parameter in everything.values():
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return [sgd]


def _adamw(groups: list[dict[str, object]], config: AdamW | Muon) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def _grouped(
    parameters: dict[str, nn.Parameter], config: TrainConfig, rate: float, layer_matrices: dict[str, nn.Parameter]
) -> list[dict[str, object]]:
    """Param groups of equal rate and weight decay, in the order of their first parameters."""
    members: dict[tuple[float, float, object], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        multiplier = rate_multiplier(name, parameter, config, name in layer_matrices)
        decay = config.optimizer.weight_decay if decays(name, parameter, config) else 0.0
        if isinstance(config.parametrization, MuP):
            decay /= multiplier
        mesh = getattr(parameter, "device_mesh", None)  # a fused update takes DTensors of one mesh
        members.setdefault((rate * multiplier, decay, mesh), []).append(parameter)
    return [
        {"params": found, "lr": own, "base_lr": own, "weight_decay": decay}
        for (own, decay, _), found in members.items()
    ]


def apply(optimizer: torch.optim.Optimizer, skip: Shaped[Tensor, ""]) -> None:
    """One update from the gradients, or none at all: a skipped step leaves weights, moments and step counts bit for bit.

    Fused AdamW and SGD read `skip` on the device, as they do for torch's GradScaler, so the host waits for nothing; Muon, and
    SGD of sharded parameters, cost one wait.

    Args:
        optimizer: one of `make_optimizers`.
        skip: 0-d, on the parameters' device, the same in every process; non-zero (NaN included) skips.
    """
    if not optimizer.defaults.get("fused"):
        if not skip.item():
            optimizer.step()
        return
    optimizer.found_inf = (skip != 0).float()  # type: ignore[attr-defined]  # the kernels compare with exactly 1.0
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


# --- schedules -----------------------------------------------------------------------------------------------------------


def tokens_before(config: TrainConfig, step: int) -> int:
    """Tokens trained on before 0-based `step`; steps beyond the run's own repeat it from the beginning."""
    rounds, inside = divmod(step, config.steps)
    before = config.sequences_before
    return (rounds * before[-1] + before[inside]) * config.sequence_length


def power_factor(config: TrainConfig, schedule: Power, step: int) -> float:
    """min(1, a (tokens so far)^exponent / peak) after `step` steps."""
    rate: float = schedule.a * tokens_before(config, step) ** schedule.exponent
    return min(1.0, rate / config.optimizer.learning_rate)


def learning_rate_factor(config: TrainConfig, step: int, steps: int | None = None) -> float:
    """The schedule's factor on the peak learning rate at 0-based `step`.

    Warm-up is linear: (step + 1)/W over the first W = ceil(warmup x steps) steps. Cosine, WSD and linear decay reach `final`
    on the last step; power depends on the tokens seen, whatever the number of steps.

    Args:
        steps: of the whole run, where data are repeated beyond config.steps; default config.steps.
    """
    schedule, steps = config.schedule, config.steps if steps is None else steps
    warm = math.ceil(schedule.warmup * steps)
    if step < warm:
        top = power_factor(config, schedule, warm) if isinstance(schedule, Power) else 1.0
        return (step + 1) / warm * top
    match schedule:
        case Power():
            return power_factor(config, schedule, step + 1)
        case Constant():
            return 1.0
        case WSD():
            start = max(warm, steps - round(schedule.decay * steps))
        case Cosine() | LinearDecay():
            start = warm
    if step < start or steps - 1 <= start:
        return 1.0
    progress = (step - start) / (steps - 1 - start)
    left = 1 - progress if isinstance(schedule, LinearDecay) else 0.5 * (1 + math.cos(math.pi * progress))
    return schedule.final + (1 - schedule.final) * left
