"""What the machine at hand can do: one measured ceiling, and the words that identify it in a record."""

import os
import platform
import time
from functools import lru_cache
from pathlib import Path

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


def available_memory(device: str = "cpu", root: Path = Path("/")) -> int:
    """Bytes that this process can still allocate on a device.

    CUDA: what the driver says is free, and what torch's allocator holds unused. CPU: the least of what the system has
    available and what each memory limit of the process's control groups (v2, or v1) leaves; page cache that could be
    dropped counts as free.

    Args:
        device: `cpu`, or a CUDA device.
        root: where /proc and /sys are looked for.
    """
    if device != "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    found = [_group_memory(group) for group in _groups(root)]
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:  # not Linux: half of what there is
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return max(0, min(size for size in found if size is not None))


def _groups(root: Path) -> list[Path]:
    """The folders of this process's control groups that may limit memory, innermost first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = root / "sys/fs/cgroup" / ("memory" if "memory" in controllers.split(",") else "")
        if not controllers or "memory" in controllers.split(","):
            own = top / path.strip("/")
            folders += [own, *(parent for parent in own.parents if parent == top or top in parent.parents)]
    return folders


def _group_memory(folder: Path) -> int | None:
    """What one control group's limit leaves; None without a limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
            droppable = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return int(most) - now + int(droppable.get(cache, 0)) if most != "max" else None
    return None


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


def bfloat16_is_fast(device: str) -> bool:
    """Whether the device has units for bfloat16 products: told by the hardware, not timed, so always the same."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
