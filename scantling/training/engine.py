"""How this machine computes a run: choices measured or looked up once, at the first start, and kept in engine.json.

A resumed run takes the choices from there, so that a second measurement cannot change its rounding.
"""

import ctypes
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from scantling.config import RunConfig
from scantling.data.preparing import cache_root
from scantling.device import available_memory, bfloat16_is_fast, fastest_float32, matmul_ceiling, processor
from scantling.errors import InputError
from scantling.evaluate import autocast
from scantling.files import write_json
from scantling.measured import remembered
from scantling.memory import fit_micro_batch, memory_settings
from scantling.model import Decoder, build
from scantling.model.attention import Attention, attend
from scantling.parts import Size
from scantling.recipe import Precision
from scantling.spec import LayerSpec, ModelSpec
from scantling.training.parallel import World

FILE, MEASURED = "engine.json", "measured.json"
LONG = 2048  # longest sequence for which keeping the attention probabilities on a CPU is tried
COMPILE_AFTER = 1200.0  # seconds a run must take before compiling is tried
FLOAT32_SETTINGS = ("highest", "high", "medium")
KERNELS: tuple[Literal["block", "fused"], ...] = ("block", "fused")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@dataclass(frozen=True)
class Engine:
    """The choices.

    Attributes:
        device: `cpu` or `cuda`; hardware: its name.
        precision: of matrix products.
        float32_matmul: torch's setting for float32 products, see `device.fastest_float32`.
        attention: kernel in training, see `model.attention.attend`.
        compile: whether layers are compiled.
        micro_batch_sequences: sequences of one forward and backward pass on one device.
        deterministic: only deterministic algorithms.
        reasons: why, in sentences, for the record.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    device: Literal["cpu", "cuda"]
    hardware: str
    precision: Precision
    float32_matmul: str
    attention: Literal["block", "fused"]
    compile: bool
    micro_batch_sequences: Size
    deterministic: bool = False
    reasons: tuple[str, ...] = ()


def choose(config: RunConfig, folder: Path, world: World) -> Engine:
    """The engine of a run: read from its folder, or chosen now and written there.

    Raises:
        InputError: the file is damaged, or the model does not fit into memory (need and have are told).
    """
    return world.agree(lambda: _kept_or_chosen(config, folder, world))


def _kept_or_chosen(config: RunConfig, folder: Path, world: World) -> Engine:
    hardware = processor() if world.device == "cpu" else torch.cuda.get_device_name()
    path = folder / FILE
    if path.exists():
        engine = _read(path)
        if engine.device == world.device:
            return engine
        print(f"{path}: was chosen on {engine.hardware}, this is {hardware}; choosing anew", file=sys.stderr)
    engine = _chosen(config, world)
    write_json(path, dataclasses.asdict(engine))
    return engine


def _read(path: Path) -> Engine:
    try:
        return TypeAdapter(Engine).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = str(error)
        if isinstance(error, ValidationError):
            fault = error.errors(include_url=False)[0]
            why = ": ".join([*(str(part) for part in fault["loc"]), fault["msg"]])
        raise InputError(f"{path}: not an engine file ({why}); delete it to choose anew") from None


def chosen(config: RunConfig, world: World) -> Engine:
    """The choices made now, by the main process for all.

    Raises:
        InputError: as `choose`.
    """
    return world.agree(lambda: _chosen(config, world))


def _chosen(config: RunConfig, world: World) -> Engine:
    hardware = processor() if world.device == "cpu" else torch.cuda.get_device_name()
    train, device, reasons = config.train, world.device, []
    precision: Precision
    if train.precision == "auto":
        precision = "bfloat16" if bfloat16_is_fast(device) else "float32"
        reasons.append(
            f"precision {precision}: the {device} {'has' if precision == 'bfloat16' else 'lacks'} bfloat16 units"
        )
    else:
        precision = train.precision
    if device == "cpu":
        float32 = _remembered("float32 products", fastest_float32, lambda value: value in FLOAT32_SETTINGS)
    else:
        float32 = "highest" if train.precision == "float32" else "high"
    torch.set_float32_matmul_precision(float32)  # before anything is timed
    attention: Literal["block", "fused"] = "fused"
    if device == "cpu":
        attention, why = fastest_attention(config.final_spec, train.sequence_length, precision)
        reasons.append(why)
    micro = micro_batch(config, world, precision, attention)
    engine = Engine(device, hardware, precision, float32, attention, False, micro, train.deterministic)
    compiles, why = compiled_pays(config, engine, world)
    return dataclasses.replace(engine, compile=compiles, reasons=(*reasons, why))


def _remembered(question: str, measure: Callable[[], Any], usable: Callable[[Any], bool]) -> Any:
    """The answer measured on this machine before, or now; a cache that moved with its user asks anew."""
    key = f"{question}; {processor()}; {torch.get_num_threads()} threads; torch {torch.__version__}"
    return remembered(cache_root() / MEASURED, key, measure, usable)


def micro_batch(config: RunConfig, world: World, precision: Precision, attention: str) -> int:
    """Sequences of one pass on one device: as the recipe says, or the most that fit into memory.

    Raises:
        InputError: not even one fits.
    """
    train = config.train
    mine = -(-train.batch_sequences // world.data_size)
    if train.gradient_accumulation_steps is not None:
        return max(1, mine // train.gradient_accumulation_steps)
    guides = config.guidance is not None
    settings = memory_settings(config.final_spec.vocab_size, train, precision, world.device, guides)
    return fit_micro_batch(
        config.final_spec,
        train.sequence_length,
        mine,
        available_memory(world.device) // world.processes_here,
        shards=world.shards,
        device=world.device,
        **{**settings, "attention": attention},
    )


def fastest_attention(
    spec: ModelSpec, sequence_length: int, precision: Precision
) -> tuple[Literal["block", "fused"], str]:
    """Which exact kernel is faster on this CPU, forward and backward, summed over the layers' distinct shapes."""
    plain = [layer for layer in spec.layers if layer.attn_logit_softcapping is None]
    if not plain or sequence_length > LONG:
        return "fused", f"attention fused: not measured at {sequence_length} tokens"
    shapes: dict[tuple[int | None, ...], list[LayerSpec]] = {}
    for layer in plain:
        key = (
            layer.num_attention_heads,
            _read_heads(layer),
            layer.head_dim,
            layer.v_head_dim,
            layer.sliding_window,
        )
        shapes.setdefault(key, []).append(layer)

    def ratio() -> float:
        block, fused = 0.0, 0.0
        for same in shapes.values():
            seconds = _attention_seconds(same[0], sequence_length, precision)
            block, fused = block + len(same) * seconds[0], fused + len(same) * seconds[1]
        return fused / block

    layers = ", ".join(f"{len(same)} x {key}" for key, same in shapes.items())
    products = torch.get_float32_matmul_precision()  # the fused kernel is slower beside oneDNN's
    question = f"block over fused attention; {precision}, {products} products, {sequence_length} tokens, {layers}"
    gain: float = _remembered(question, ratio, lambda value: isinstance(value, float) and value > 0)
    best = KERNELS[gain < 1]
    faster = max(gain, 1 / gain)
    return best, f"attention {best}: {faster:.2f}x as fast as the other kernel here at {sequence_length} tokens"


def _read_heads(layer: LayerSpec) -> int:
    """Key/value heads as the kernel gets them: a map of heads to groups gives each query head its own copy."""
    return layer.num_key_value_heads if layer.head_to_group is None else layer.num_attention_heads


def _attention_seconds(layer: LayerSpec, length: int, precision: Precision, sequences: int = 2) -> list[float]:
    """The fastest forward and backward pass of each kernel, in turn, so that a busy machine is unfair to neither."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    heads, groups = layer.num_attention_heads, _read_heads(layer)

    def tensor(count: int, size: int) -> torch.Tensor:
        return torch.ones(sequences, length, count, size, dtype=dtype).transpose(1, 2).requires_grad_()

    q, k, v = tensor(heads, layer.head_dim), tensor(groups, layer.head_dim), tensor(groups, layer.v_head_dim)
    gradient = torch.ones(sequences, heads, length, layer.v_head_dim, dtype=dtype)
    best = [float("inf")] * len(KERNELS)
    for _ in range(6):
        for number, kernel in enumerate(KERNELS):
            started = time.perf_counter()
            attend(q, k, v, layer.scale, layer.sliding_window, kernel=kernel).backward(gradient)
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def compiled_pays(config: RunConfig, engine: Engine, world: World) -> tuple[bool, str]:
    """Whether the layers shall be compiled, and why: as the recipe says, or where the time saved pays for the compilation.

    Only runs longer than `COMPILE_AFTER` are measured: a forward and backward pass of one sequence or a few, both ways.
    """
    setting, micro = config.train.compile, engine.micro_batch_sequences
    if setting != "auto" or config.guidance is not None:
        return setting == "on", f"compile {setting}: " + (
            "asked for" if setting != "auto" else "the weight of the guides changes every step"
        )
    seconds = config.train_flops / world.size / (0.6 * matmul_ceiling(engine.precision, engine.device))
    if seconds < COMPILE_AFTER:
        return False, f"compile off: the run takes less than {COMPILE_AFTER / 60:.0f} minutes"
    model = build(config.final_spec, seed=0, device=engine.device)
    apply(engine, model)
    ids = torch.zeros(min(micro, 4), config.train.sequence_length, dtype=torch.long, device=engine.device)
    try:
        plain = _pass_seconds(engine, model, ids, 3)
        for layer in model.layers:
            layer.compile()
        compiling = _pass_seconds(engine, model, ids, 1)
        compiled = _pass_seconds(engine, model, ids, 3)
    except Exception as error:  # no compiler, or a model it cannot take: the run goes on without
        return False, f"compile off: {type(error).__name__} while trying"
    saved = (1 - compiled / plain) * seconds
    says = f"{plain / compiled:.2f}x as fast, {compiling:.0f} s to compile"
    return (True, f"compile on: {says}") if saved > 2 * compiling else (False, f"compile off: {says}")


def _pass_seconds(engine: Engine, model: Decoder, ids: torch.Tensor, times: int) -> float:
    """Seconds of the fastest forward and backward pass."""
    best = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        with autocasting(engine):
            loss = model.loss(ids, ids)
        loss.backward()
        model.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return best


def apply(engine: Engine, model: Decoder) -> None:
    """Put the choices into effect: process-wide settings, and the model's kernels."""
    torch.set_float32_matmul_precision(engine.float32_matmul)
    if engine.device == "cpu":
        keep_freed_memory()
    elif engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which torch asks for
        torch.use_deterministic_algorithms(True)
    for module in model.modules():
        if isinstance(module, Attention):
            module.kernel = engine.attention
    if engine.compile:
        for layer in model.layers:
            layer.compile()


def keep_freed_memory() -> None:
    """Have glibc keep freed memory instead of returning it, so that a step does not fault its activations in anew."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def autocasting(engine: Engine) -> Any:
    """The context in which the forward pass runs."""
    return autocast(engine.precision, engine.device)
