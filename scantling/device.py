"""What the machine at hand can do: one measured ceiling, and the words that identify it in a record."""

import os
import platform
import time
from functools import lru_cache

import numpy
import torch

import scantling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@lru_cache(maxsize=4)
def matmul_ceiling(precision: str, device: str = "cpu", size: int = 1024, seconds: float = 0.15) -> float:
    """FLOP/s of the best of repeated square matrix products in this process, at its thread count: what MFU refers to."""
    a = torch.randn(size, size, device=device).to(DTYPES[precision])
    b = torch.randn(size, size, device=device).to(DTYPES[precision])
    best, started = float("inf"), time.perf_counter()
    a @ b
    while time.perf_counter() - started < seconds:
        before = time.perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best if best < float("inf") else 2 * size**3 / seconds


@lru_cache(maxsize=1)
def fastest_float32() -> str:
    """Choose the matrix-product back end for float32 once per process and say which.

    torch's "medium" setting routes float32 products to oneDNN on a CPU. Where that is float32 in truth (probed against
    float64, not assumed: some processors then compute in bfloat16) and faster, it stays; otherwise the default does.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(512, 384, generator=generator), torch.randn(384, 1152, generator=generator)
    exact = a.double() @ b.double()

    def probe() -> tuple[float, float]:
        error = ((a @ b).double() - exact).norm() / exact.norm()
        times = []
        for _ in range(7):
            started = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - started)
        return error.item(), min(times)

    before = torch.get_float32_matmul_precision()
    _, default_seconds = probe()
    torch.set_float32_matmul_precision("medium")
    error, seconds = probe()
    if error < 2e-6 and seconds < 0.9 * default_seconds:
        return "medium"
    torch.set_float32_matmul_precision(before)
    return before


@lru_cache(maxsize=1)
def processor() -> str:
    """The processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(precision: str, device: str) -> dict[str, object]:
    """What a record says of where it was made."""
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "precision": precision,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scantling": scantling.__version__,
    }
