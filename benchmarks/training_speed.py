"""Training tokens/s against the loop people fork and against transformers' Llama: shapes and batches identical, side by side.

Every side is a process of its own, since the matrix-product back end and the allocator's settings are process-wide; they are
stepped in turn, one at a time. Ours is the engine's own step with the choices it makes by default (`default`), held to float32
(`float32`), or with compiled layers, as long runs have where a measurement says that it pays (`compiled`). MFU counts
3 x forward with full attention, against the largest of repeated 1024^3 products in the same precision, taken in one of the
processes between the rounds.

    python benchmarks/training_speed.py [--shapes 6x384,4x128,12x768] [--rounds 9] [--threads 2] [--compiled]
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np

from scantling.costing import flops_per_token
from scantling.resolve import spec_from
from scantling.rows import rows
from scantling.spec import ModelSpec


class Shape(NamedTuple):
    """Layers, width, heads, vocabulary, context, sequences of a step, and steps of a round."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    context: int
    sequences: int
    steps: int


SHAPES = {
    "6x384": Shape(6, 384, 6, 65, 256, 12, 3),
    "4x128": Shape(4, 128, 4, 65, 128, 32, 12),
    "12x768": Shape(12, 768, 12, 50304, 512, 2, 1),
}
GPT_GOALS = {"6x384": (3.3, 1.9, 1.35), "4x128": (2.8, 1.7, 1.8), "12x768": (3.0, 1.9, None)}
MFU_GOALS = {("6x384", "default"): 0.80, ("12x768", "default"): 0.65, ("6x384", "float32"): 0.85}
LLAMA_GOAL = 3.0
TOKENS = 400_000  # of random text


def gpt_spec(shape: Shape) -> ModelSpec:
    """The reference's model as a spec."""
    return spec_from(
        {
            "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "max_position_embeddings": shape.context, "tie_word_embeddings": True,
            "position": {"kind": "none"}, "learned_positions": True, "norm": {"kind": "layer_norm", "bias": False},
            "initialization": {"kind": "normal", "std": 0.02, "depth_scaled": True},
            "ffn": {"kind": "dense", "gated": False, "hidden_act": "gelu", "expansion": 4},
        }
    )  # fmt: skip


def llama_spec(shape: Shape) -> ModelSpec:
    """transformers' Llama of this shape: gated SiLU feed-forward of 8/3 of the width, rounded up to 64."""
    return spec_from(
        {
            "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "max_position_embeddings": shape.context, "tie_word_embeddings": True,
            "norm": {"kind": "rms_norm", "eps": 1e-6},
            "ffn": {"kind": "dense", "gated": True, "hidden_act": "silu", "intermediate_size": intermediate(shape)},
        }
    )  # fmt: skip


def intermediate(shape: Shape) -> int:
    """The inner width of the Llama feed-forward."""
    return -(-shape.width * 8 // 3 // 64) * 64


def ours(shape: Shape, spec: ModelSpec, precision: str, compiled: str = "off") -> Callable[[], object]:
    """The engine's own step; `compiled` on is what long runs do where it pays."""
    import torch

    from scantling.config import run_from
    from scantling.data import prepare
    from scantling.model import build
    from scantling.resolve import to_mapping
    from scantling.training import engine as engines
    from scantling.training.parallel import World
    from scantling.training.step import Stepper

    folder = Path(tempfile.mkdtemp())
    dtype = np.uint16
    for name in ("train", "val"):
        np.random.default_rng(0).integers(0, shape.vocabulary, TOKENS).astype(dtype).tofile(folder / f"{name}.bin")
    batch = shape.sequences * shape.context
    config = run_from(
        {
            "name": "speed", "model": to_mapping(spec),
            "data": {"source": str(folder), "tokenizer": {"kind": "ids", "vocab_size": shape.vocabulary}},
            "train": {
                "tokens": 1000 * batch, "batch_tokens": batch, "sequence_length": shape.context, "precision": precision,
                "compile": compiled, "optimizer": {"learning_rate": 1e-3},
            },
        },
        "benchmark",
    )  # fmt: skip
    world = World()
    model = build(config.spec, seed=0)
    stepper = Stepper(config, engines.chosen(config, world), world, prepare(config.data, folder / "cache"), model)
    torch.manual_seed(0)
    numbers = iter(range(10**9))
    return lambda: stepper.step(next(numbers) % 900, 0, float("inf")).read()


def reference(shape: Shape, bfloat16: bool) -> Callable[[], object]:
    """The plain loop."""
    from gpt_reference import GPT, Loop

    data = np.random.default_rng(0).integers(0, shape.vocabulary, TOKENS).astype(np.uint16)
    model = GPT(shape.vocabulary, shape.context, shape.layers, shape.width, shape.heads)
    return Loop(model, data, shape.sequences, shape.context, bfloat16, 1e-3).step


def transformers_llama(shape: Shape) -> Callable[[], object]:
    """transformers' Llama from a config, with torch's default AdamW and clipping."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=intermediate(shape),
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    chance = np.random.default_rng(0)

    def step() -> float:
        ids = torch.from_numpy(chance.integers(0, shape.vocabulary, (shape.sequences, shape.context)))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def side(name: str, shape: Shape) -> Callable[[], object]:
    """A side of the comparison by its name."""
    match name:
        case "plain float32":
            return reference(shape, False)
        case "plain bfloat16":
            return reference(shape, True)
        case "ours default":
            return ours(shape, gpt_spec(shape), "auto")
        case "ours float32":
            return ours(shape, gpt_spec(shape), "float32")
        case "ours compiled":
            return ours(shape, gpt_spec(shape), "auto", "on")
        case "our Llama compiled":
            return ours(shape, llama_spec(shape), "auto", "on")
        case "transformers Llama":
            return transformers_llama(shape)
        case "our Llama":
            return ours(shape, llama_spec(shape), "auto")
    raise ValueError(name)


def worker(name: str, shape: Shape, threads: int, pipe: Connection) -> None:
    """Build a side, then step it on request and tell the seconds, or measure the ceilings of matrix products."""
    import torch

    from scantling.device import matmul_ceiling

    torch.set_num_threads(threads)
    step = side(name, shape)
    for _ in range(2):
        step()
    pipe.send("ready")
    while (request := pipe.recv()) != "end":
        if request == "ceilings":
            matmul_ceiling.cache_clear()
            pipe.send({precision: matmul_ceiling(precision, seconds=0.3) for precision in ("float32", "bfloat16")})
            continue
        started = time.perf_counter()
        for _ in range(request):
            step()
        pipe.send((time.perf_counter() - started) / request)


def compare(
    shape: Shape, names: list[str], rounds: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per step of every side in every round, and the best ceilings seen (float32: our back end's)."""
    context = multiprocessing.get_context("spawn")
    sides: dict[str, Connection] = {}
    processes = []
    for name in names:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(name, shape, threads, there), daemon=True)
        process.start()
        processes.append(process)
        sides[name] = here
        here.recv()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    ceilings = {"float32": 0.0, "bfloat16": 0.0}
    ours_name = next(name for name in names if name.startswith("our"))
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            sides[name].send(shape.steps)
            seconds[name].append(sides[name].recv())
        sides[ours_name].send("ceilings")
        for precision, rate in sides[ours_name].recv().items():
            ceilings[precision] = max(ceilings[precision], rate)
    for pipe, process in zip(sides.values(), processes, strict=True):
        pipe.send("end")
        process.join(10)
    return seconds, ceilings


def error_against_float64() -> list[dict[str, Any]]:
    """Gradients of one step in float32, by the plain loop's back end and by ours, against the same step in float64."""
    import torch

    from scantling.device import fastest_float32
    from scantling.model import build

    shape = Shape(4, 128, 4, 65, 128, 8, 1)
    spec = gpt_spec(shape)
    ids = torch.randint(
        0, shape.vocabulary, (shape.sequences, shape.context), generator=torch.Generator().manual_seed(0)
    )

    def gradients(dtype: torch.dtype, kernel: str) -> torch.Tensor:
        model = build(spec, seed=0).to(dtype)
        for layer in model.layers:
            layer.self_attn.kernel = kernel
        model.loss(ids, ids.roll(-1, 1)).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])

    exact = gradients(torch.float64, "fused")
    torch.set_float32_matmul_precision("highest")
    found = {"default back end, fused attention": gradients(torch.float32, "fused")}
    back_end = fastest_float32()
    found[f"ours: back end '{back_end}', block attention"] = gradients(torch.float32, "block")
    return [
        {"float32 gradients": name, "relative error": f"{float((value - exact).norm() / exact.norm()):.1e}"}
        for name, value in found.items()
    ]


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--shapes", default=",".join(SHAPES))
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--compiled", action="store_true", help="time compiled layers too; compiling takes minutes")
    chosen = arguments.parse_args()
    speeds, shares, llamas, ceilings_found = [], [], [], []
    for label in chosen.shapes.split(","):
        shape = SHAPES[label]
        names = ["plain float32", "plain bfloat16", "ours default", "ours float32"]
        names += ["ours compiled"] if chosen.compiled else []
        seconds, ceilings = compare(shape, names, chosen.rounds, chosen.threads)
        rivals = (
            ("plain float32", "ours default"),
            ("plain float32", "ours float32"),
            ("plain bfloat16", "ours default"),
        )
        if chosen.compiled:
            rivals += (("plain float32", "ours compiled"),)
        for (plain, own), goal in zip(rivals, (*GPT_GOALS[label], None), strict=False):
            ratio = harness.ratio(seconds[plain], seconds[own])
            speeds.append(
                {
                    "shape": label, "ours": own, "against": plain, "tokens/s ratio": ratio,
                    "quartiles": harness.spread(seconds[plain], seconds[own]),
                    "goal": goal or "-", "hit": "-" if goal is None else "yes" if ratio >= goal else "no",
                }
            )  # fmt: skip
        flops = float(flops_per_token(rows(gpt_spec(shape)), shape.context)["train"]) * shape.sequences * shape.context
        for name, precision in (
            ("ours default", "bfloat16"), ("ours compiled", "bfloat16"), ("ours float32", "float32"),
            ("plain bfloat16", "bfloat16"), ("plain float32", "float32"),
        ):  # fmt: skip
            if name not in seconds:
                continue
            share = flops / statistics.median(seconds[name]) / ceilings[precision]
            goal = MFU_GOALS.get((label, name.removeprefix("ours ")))
            shares.append(
                {
                    "shape": label, "side": name, "MFU": share, "of the ceiling in": precision,
                    "goal": goal or "-", "hit": "-" if goal is None else "yes" if share >= goal else "no",
                }
            )  # fmt: skip
        llama_sides = ["our Llama"] + (["our Llama compiled"] if chosen.compiled else [])
        seconds, _ = compare(shape, ["transformers Llama", *llama_sides], chosen.rounds, chosen.threads)
        for own in llama_sides:
            ratio = harness.ratio(seconds["transformers Llama"], seconds[own])
            llamas.append(
                {
                    "shape": label, "ours": own, "tokens/s ratio": ratio,
                    "quartiles": harness.spread(seconds["transformers Llama"], seconds[own]),
                    "goal": LLAMA_GOAL, "hit": "yes" if ratio >= LLAMA_GOAL else "no",
                }
            )  # fmt: skip
        ceilings_found.append(
            {
                "shape": label,
                "bfloat16 / float32 ceiling": ceilings["bfloat16"] / ceilings["float32"],
                "threads": chosen.threads,
            }
        )
    harness.report(
        "training_speed",
        "Training speed against the loop people fork",
        {
            "Against the plain GPT-2 loop (tokens/s, higher is better)": speeds,
            "Model FLOPs utilisation": shares,
            "Against transformers' Llama from a config, both at their defaults": llamas,
            "How much faster bfloat16 products are than float32 ones here": ceilings_found,
            "Float32 is float32": error_against_float64(),
        },
        [
            "Goals above the ratio of the ceilings can be reached only where the plain loop's float32 products leave the "
            "processor's vector units unused, or waste time outside products.",
            "The float32 ceiling is that of the back end we chose; the plain loop's is torch's default.",
        ],
    )


if __name__ == "__main__":
    main()
