"""Counts as people write them: `300M`, `1e9`, `3.4 GiB`, `2.1 EFLOP`. Parsing and printing, no arithmetic."""

import math
import re

from scantling.errors import InputError

DECIMAL = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18, "Z": 1e21, "Y": 1e24}
BINARY = {"KI": 2.0**10, "MI": 2.0**20, "GI": 2.0**30, "TI": 2.0**40}
DTYPE_BYTES = {
    "fp32": 4,
    "float32": 4,
    "tf32": 4,
    "bf16": 2,
    "bfloat16": 2,
    "fp16": 2,
    "float16": 2,
    "int8": 1,
    "fp8": 1,
}

_NUMBER = re.compile(r"^\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*$")


def parse_count(text: str | float, what: str = "count") -> float:
    """A finite number from `3e8`, `300M`, `1.5T`, `24GiB`, `2 EFLOP`. A unit word after it (FLOP, tokens) is ignored.

    `B` alone means 1e9 (as in "7B"); `GB` is 1e9 bytes, `GiB` 2**30.

    Raises:
        InputError: when the text is not a number with a known suffix, or is not finite.
    """
    if isinstance(text, bool):
        raise InputError(f"{what}: expected a number, got {text!r}")
    if isinstance(text, int | float):
        value = float(text)
    else:
        match = _NUMBER.match(text)
        if match is None:
            raise InputError(f"{what}: expected a number such as 3e8, 300M or 24GiB, got {text!r}")
        value = float(match[1].replace("_", "")) * _suffix(match[2], what, text)
    if not math.isfinite(value):
        raise InputError(f"{what}: expected a finite number, got {text!r}")
    return value


def _suffix(suffix: str, what: str, text: str) -> float:
    stem = re.sub(r"(FLOPS?|TOKENS?|PARAMS?|BYTES?)$", "", suffix.upper())
    for units in (BINARY, DECIMAL):
        if stem in units:
            return units[stem]
        if stem.endswith("B") and stem[:-1] in units:
            return units[stem[:-1]]
    raise InputError(f"{what}: unknown unit {suffix!r} in {text!r}; use K, M, B, T, P, E or KiB, MiB, GiB, TiB")


def dtype_bytes(name: str) -> int:
    """Bytes of one value of a dtype named as people name it (`bf16`, `float32`)."""
    if name not in DTYPE_BYTES:
        raise InputError(f"dtype: unknown {name!r}; expected one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def format_count(value: float, digits: int = 3) -> str:
    """`1234567 -> '1.23M'`; integers below 1000 stay as they are."""
    return _scaled(value, 1000.0, ("", "K", "M", "B", "T", "P", "E", "Z", "Y"), digits)


def format_flops(value: float, digits: int = 3) -> str:
    """`2.1e18 -> '2.1 EFLOP'`."""
    return _scaled(
        value, 1000.0, (" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP", " ZFLOP", " YFLOP"), digits
    )


def format_bytes(value: float, digits: int = 3) -> str:
    """`3650722201 -> '3.4 GiB'`."""
    return _scaled(value, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"), digits)


def format_seconds(value: float) -> str:
    """`4000 -> '1 h 07 min'`."""
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes = round(value / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{value / 86400:,.1f} days"


def _scaled(value: float, base: float, suffixes: tuple[str, ...], digits: int) -> str:
    if value == 0:
        return "0" + suffixes[0]
    step = min(max(0, math.floor(math.log(abs(value), base))), len(suffixes) - 1)
    scaled = value / base**step
    if round(abs(scaled), max(0, digits - 3)) >= base and step < len(suffixes) - 1:
        step, scaled = step + 1, scaled / base
    text = f"{scaled:.{digits}g}" if abs(scaled) < 1000 else f"{scaled:.0f}"
    if float(scaled).is_integer() and abs(scaled) < base:
        text = f"{scaled:.0f}"
    return text + suffixes[step]


_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?")


def parse_duration(text: str, where: str) -> float:
    """Seconds of `2h30m`, `45m`, `90s` or `90`.

    Raises:
        InputError: not such a text, or nothing.
    """
    match = _DURATION.fullmatch(text.strip())
    parts = [float(part or 0) for part in match.groups()] if match else [0.0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if seconds <= 0:
        raise InputError(f"{where}: expected a duration such as 90s, 45m or 2h30m, got {text!r}")
    return seconds
