"""Growing a sharded Llama folder in width, heads and depth, beside `cp` of as many bytes as the result has.

The growing process runs under an address-space-free memory limit of its own (its peak resident set is measured). Both sides
write to the same disk, interleaved, with dirty pages flushed before the clock stops.

    python benchmarks/growth_streaming.py [--layers 32] [--rounds 1] [--folder FOLDER]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from scantling.hf_folder import write_stock
from scantling.resolve import spec_from
from scantling.tensor_files import Produced
from scantling.growth.axes import shapes

RESULTS = Path(__file__).parent / "results"
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
WIDER = {"hidden_size": 4608, "num_attention_heads": 40}


def make(folder: Path, layers: int) -> None:
    """A random bfloat16 checkpoint in shards of 5 GB, tensor by tensor."""
    config = {**LLAMA, "num_hidden_layers": layers}
    spec = spec_from(dict(config))
    generator = torch.Generator().manual_seed(0)
    pool = torch.empty(2**24).normal_(0.0, 0.02, generator=generator).bfloat16()

    def tensor(name: str) -> torch.Tensor:
        wanted = torch.empty(shapes(spec)[name], dtype=torch.bfloat16)
        flat = wanted.view(-1)
        for start in range(0, flat.numel(), len(pool)):
            flat[start : start + len(pool)] = pool[: flat.numel() - start]
        return wanted

    kinds = {name: (shape, torch.bfloat16) for name, shape in shapes(spec).items()}
    write_stock(folder, spec, Produced(kinds, tensor), config, [], {})


def seconds(command: list[str]) -> tuple[float, int]:
    """Wall time until the disk has it, and the peak resident set of the command in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    os.sync()
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("growth-benchmark"))
    given = parser.parse_args()
    root = given.folder
    root.mkdir(parents=True)
    try:
        make(root / "source", given.layers)
        depth = given.layers + max(1, given.layers // 8)
        (root / "to.json").write_text(json.dumps({**LLAMA, **WIDER, "num_hidden_layers": depth}))
        grow = [sys.executable, "-m", "scantling", "grow", str(root / "source"), "--to", str(root / "to.json"), "--no-measure"]
        ratios, peaks, size = [], [], 0
        for _ in range(given.rounds):
            grown, peak = seconds([*grow, "--out", str(root / "out")])
            size = sum(file.stat().st_size for file in (root / "out").iterdir())
            shutil.move(root / "out", root / "result")
            copied, _ = seconds(["cp", "-r", str(root / "result"), str(root / "copy")])
            ratios.append(grown / copied)
            peaks.append(peak)
            for name in ("result", "copy"):
                shutil.rmtree(root / name)
        tensors = spec_from({**LLAMA, **WIDER, "num_hidden_layers": depth})
        largest = max(torch.Size(shape).numel() for shape in shapes(tensors).values()) * 2
        source = sum(file.stat().st_size for file in (root / "source").iterdir())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    result = {
        "command": " ".join(["python", "benchmarks/growth_streaming.py", *sys.argv[1:]]).replace(str(given.folder), "FOLDER"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "layers": given.layers,
        "source_gb": source / 1e9,
        "target_gb": size / 1e9,
        "time_over_cp_of_target": statistics.median(ratios),
        "peak_gib": max(peaks) / 2**30,
        "largest_tensor_gib": largest / 2**30,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth_streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [f"- {key}: {value:.3g}" if isinstance(value, float) else f"- {key}: {value}" for key, value in result.items()]
    (RESULTS / "growth_streaming.md").write_text("# Growing a sharded checkpoint beside cp\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
