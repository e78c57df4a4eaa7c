"""Growing a sharded Llama folder in width, heads and depth, beside `cp` of as many bytes as the result has.

Both sides run as processes of their own, in turn, on one disk: what they read is not in the page cache when the clock starts,
and what they wrote is on the disk when it stops. The peak resident set of the growing process is measured.

    python benchmarks/growth_streaming.py [--layers 32] [--rounds 3] [--folder FOLDER]
"""

import argparse
import hashlib
import json
import multiprocessing
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

from scantling.growth.axes import shapes
from scantling.hf_folder import write_stock
from scantling.resolve import spec_from
from scantling.tensor_files import Produced

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


def forget(folder: Path) -> None:
    """Have the page cache forget a folder's files."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hashing_speed() -> float:
    """Bytes per second of SHA-256 alone, on one core."""
    block, count = bytes(2**20), 512
    started, sha256 = time.perf_counter(), hashlib.sha256()
    for _ in range(count):
        sha256.update(block)
    return len(block) * count / (time.perf_counter() - started)


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("growth-benchmark"))
    given = parser.parse_args()
    root = given.folder
    root.mkdir(parents=True)
    try:
        maker = multiprocessing.Process(target=make, args=(root / "source", given.layers))  # its peak is not ours
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit("the source could not be made")
        depth = given.layers + max(1, given.layers // 8)
        (root / "to.json").write_text(json.dumps({**LLAMA, **WIDER, "num_hidden_layers": depth}))
        grow = [sys.executable, "-m", "scantling", "grow", str(root / "source"), "--to", str(root / "to.json")]
        grown, copied, peaks, size = [], [], [], 0
        for _ in range(given.rounds):
            forget(root / "source")
            took, peak = seconds([*grow, "--no-measure", "--out", str(root / "result")])
            grown.append(took)
            peaks.append(peak)
            size = sum(file.stat().st_size for file in (root / "result").iterdir())
            forget(root / "result")
            took, _ = seconds(["cp", "-r", str(root / "result"), str(root / "copy")])
            copied.append(took)
            print(f"grow {grown[-1]:.1f} s, cp {took:.1f} s, load {os.getloadavg()[0]:.1f}", flush=True)
            for name in ("result", "copy"):
                shutil.rmtree(root / name)
        tensors = spec_from({**LLAMA, **WIDER, "num_hidden_layers": depth})
        largest = max(torch.Size(shape).numel() for shape in shapes(tensors).values()) * 2
        source = sum(file.stat().st_size for file in (root / "source").iterdir())
    finally:
        shutil.rmtree(root, ignore_errors=True)
    ratios = [one / other for one, other in zip(grown, copied, strict=True)]
    result = {
        "command": " ".join(["python", "benchmarks/growth_streaming.py", *sys.argv[1:]]).replace(
            str(given.folder), "FOLDER"
        ),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "layers": given.layers,
        "source_gb": source / 1e9,
        "target_gb": size / 1e9,
        "rounds": given.rounds,
        "grow_seconds": statistics.median(grown),
        "cp_seconds": statistics.median(copied),
        "time_over_cp_of_target": statistics.median(ratios),
        "lowest_and_highest": f"{min(ratios):.2f}, {max(ratios):.2f}",
        "sha256_alone_over_cp": size / hashing_speed() / statistics.median(copied),
        "peak_gib": max(peaks) / 2**30,
        "largest_tensor_gib": largest / 2**30,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth_streaming.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"- {key}: {value:.3g}" if isinstance(value, float) else f"- {key}: {value}" for key, value in result.items()
    ]
    (RESULTS / "growth_streaming.md").write_text(
        "# Growing a sharded checkpoint beside cp\n\n" + "\n".join(lines) + "\n"
    )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
