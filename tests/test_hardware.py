"""The device table and the roofline: hand-computed cases, order, arrays, and the command line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scantling.cli import main
from scantling.costing import cost
from scantling.errors import InputError
from scantling.hardware import (
    MBU,
    MFU,
    Device,
    decode_time,
    find_device,
    load_hardware,
    prefill_time,
    priced,
    roofline,
    train_time,
)
from scantling.memory import training_memory
from scantling.resolve import load_spec

TABLE = load_hardware()
TOY = Device(
    name="toy",
    peak_flops={"bf16": 1000.0, "fp32": 500.0},
    memory_bandwidth=100.0,
    memory_bytes=1e6,
    source="made up",
    date="2025",
    price={"usd_per_hour": 3.6, "source": "made up", "date": "2025"},  # type: ignore[arg-type]
)


def test_roofline_by_hand() -> None:
    compute = roofline(4000, 70, TOY, "bf16", mfu=0.5, mbu=0.7)
    assert (compute.compute_seconds, compute.memory_seconds) == (8.0, pytest.approx(1.0))
    assert (compute.seconds, compute.bound) == (8.0, "compute")
    memory = roofline(400, 700, TOY, "bf16", mfu=0.5, mbu=0.7)
    assert (memory.seconds, memory.bound) == (pytest.approx(10.0), "memory")
    assert roofline(4000, 70, TOY, "float32", mfu=0.5, mbu=0.7).seconds == 16.0
    assert TOY.usd(memory.seconds) == pytest.approx(0.01)
    assert isinstance(memory.seconds, float) and isinstance(memory.bound, str)


def test_arrays_equal_numbers() -> None:
    flops, moved = np.array([10.0, 1e5, 4000.0]), np.array([500.0, 3.0, 280.0])
    found = roofline(flops, moved, TOY)
    for index in range(3):
        one = roofline(float(flops[index]), float(moved[index]), TOY)
        assert (found.seconds[index], found.bound[index]) == (one.seconds, one.bound)
    assert TOY.usd(found.seconds).shape == (3,)


def test_llama_decodes_at_the_memorys_pace() -> None:
    """Batch 1: 15.0 GB of weights but the input table, and 1 GiB of cache at 8K, over 3.35 TB/s x 0.7."""
    priced_8b = cost(load_spec(LLAMA), 8192)
    step = decode_time(priced_8b, TABLE["h100-sxm"])
    read = (8030261248 - 128256 * 4096) * 2 + 131072 * 8192
    assert step.bound == "memory" and step.seconds == pytest.approx(read / (3.35e12 * 0.7))
    assert prefill_time(priced_8b, TABLE["h100-sxm"]).bound == "compute"


LLAMA = next(
    path for path in sorted((Path(__file__).parent / "data").rglob("*.json")) if "llama-3.1-8b" in path.name.lower()
)


@pytest.fixture(scope="module")
def uniform() -> Any:
    return load_spec(Path(__file__).parent / "data" / "contract" / "spec-uniform.yaml")


def test_order(uniform: Any) -> None:
    """More context, more batch, less utilisation: never faster; a faster device: never slower."""
    device = TABLE["a100-80"]
    short, long, wide = cost(uniform, 64), cost(uniform, 4096), cost(uniform, 64, batch=8)
    for time in (prefill_time, decode_time):
        assert time(short, device).seconds < time(long, device).seconds
        assert time(short, device).seconds < time(wide, device).seconds
        assert time(short, device, mfu=0.1, mbu=0.1).seconds > time(short, device).seconds
        assert time(short, TABLE["h100-sxm"]).seconds < time(short, device).seconds
    assert decode_time(wide, device).seconds < 8 * decode_time(short, device).seconds  # weights are shared


def test_a_training_step_by_hand(uniform: Any) -> None:
    priced_one, memory = cost(uniform, 128), training_memory(uniform, 128, 4)
    step = train_time(priced_one, memory.state, memory.kept, 512, TABLE["h100-sxm"])
    assert step.compute_seconds == pytest.approx(priced_one.flops_per_token["train"] * 512 / (989.4e12 * MFU))
    n = priced_one.params["total"]
    moved = 3 * n * 2 + 2 * 16 * n + 2 * (memory.activations + memory.logits)
    assert step.memory_seconds == pytest.approx(moved / (3.35e12 * MBU))
    again = train_time(priced_one, memory.state, memory.kept, 512, TABLE["h100-sxm"], checkpointing=True)
    assert again.compute_seconds == pytest.approx(step.compute_seconds * 4 / 3)


def test_money(uniform: Any) -> None:
    held = training_memory(uniform, 128)
    found = priced(cost(uniform, 128, batch=4), held.state, held.kept, 128, TABLE["h100-sxm"], "bf16")
    dollars = found["seconds"]["decode_token"] / 4 * 1e6 * 2.99 / 3600
    assert found["usd_per_million_tokens"]["decode"] == pytest.approx(dollars)
    unpriced = priced(cost(uniform, 128), held.state, held.kept, 128, TABLE["b200"], "bf16")
    assert set(unpriced["usd_per_million_tokens"].values()) == {None}


# --- the table ---------------------------------------------------------------------------------------------------------


def test_every_device_is_sourced_and_plausible() -> None:
    assert {"a100-40", "a100-80", "h100-sxm", "h100-pcie", "h200", "b200", "mi300x", "l4", "l40s", "rtx-4090"} <= set(
        TABLE
    )
    for device in TABLE.values():
        assert device.source and device.date
        assert device.price is None or device.price.indicative
        peaks = {str(name): value for name, value in device.peak_flops.items()}
        order = [peaks[name] for name in ("fp32", "tf32", "bf16", "fp8") if name in peaks]
        assert order == sorted(order)
        assert peaks.get("bf16", 0) == peaks.get("fp16", peaks.get("bf16", 0))
        if device.name.startswith("two"):
            continue
        assert 50 < peaks["bf16"] / device.memory_bandwidth < 600  # FLOPs per byte: dense peaks, not sparse ones


def test_unknown_device_and_dtype() -> None:
    with pytest.raises(InputError, match=r"unknown 'h100-smx'; did you mean 'h100-sxm'\?"):
        find_device("h100-smx")
    with pytest.raises(InputError, match=r"A100 80GB.*no peak FLOP/s for dtype 'fp8'; expected one of fp32"):
        TABLE["a100-80"].peak("fp8")
    for share in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(InputError, match="mfu: expected a share"):
            roofline(1, 1, TOY, mfu=share)


def test_a_users_file_is_merged_over_the_table(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "h100-sxm: {price: {usd_per_hour: 1.5, source: contract, date: '2026'}}\n"
        "mine: {name: mine, peak_flops: {bf16: 1e12}, memory_bandwidth: 1e11, memory_bytes: 1e9, source: me, date: '2026'}\n"
    )
    found = load_hardware(file)
    assert found["h100-sxm"].price is not None and found["h100-sxm"].price.usd_per_hour == 1.5
    assert found["h100-sxm"].peak("bf16") == TABLE["h100-sxm"].peak("bf16")
    assert found["mine"].peak("bfloat16") == 1e12 and found["l4"] == TABLE["l4"]


def test_faults_of_a_users_file_are_placed(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("h100-sxm:\n  memory_bandwidth: -1\nl4:\n  peak_flops: {bf17: 1e12}\nnew: {name: x}\n")
    with pytest.raises(InputError) as caught:
        load_hardware(file)
    said = "\n".join(caught.value.faults)
    assert "bad.yaml:2: h100-sxm.memory_bandwidth: " in said
    assert "bad.yaml:4: l4.peak_flops.bf17: " in said
    assert "bad.yaml:5: new.memory_bytes: " in said
    file.write_text("h100-sxm: 3\n")
    with pytest.raises(InputError, match="bad.yaml:1: h100-sxm: expected a mapping"):
        load_hardware(file)


# --- the command line --------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def test_cost_json_adds_memory_always_and_time_when_asked(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    file = contract / "spec-uniform.yaml"
    code, out, _ = run(capsys, "cost", file, "--json")
    plain = json.loads(out)
    assert code == 0 and not {"device", "seconds", "bound", "usd_per_million_tokens"} & set(plain)
    memory = plain["training_memory"]
    assert memory["weights"] == 4 * plain["params"]["total"]
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    assert memory["total"] == sum(memory[name] for name in parts) and memory["convention"]["total"]
    code, out, _ = run(capsys, "cost", file, "--json", "--device", "h100-sxm", "--train-batch", 4, "--checkpointing")
    found = json.loads(out)
    assert code == 0 and found["device"] == "h100-sxm"
    assert set(found["seconds"]) == {"prefill", "decode_token", "train_token"}
    assert set(found["bound"]) == set(found["usd_per_million_tokens"]) == {"prefill", "decode", "train"}
    assert set(found["bound"].values()) <= {"compute", "memory"}
    assert found["training_memory"]["convention"]["recompute"] == "checkpointing"
    assert {key: found[key] for key in plain if key != "training_memory"} == {
        key: value for key, value in plain.items() if key != "training_memory"
    }


def test_cost_tables_side_by_side_show_differences(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    files = [contract / "spec-uniform.yaml", contract / "spec-moe.yaml"]
    code, out, _ = run(capsys, "cost", *files, "--device", "h200", "--context", 128)
    assert code == 0 and "394,560 (-48.0 %)" in out and "(memory)" in out and "training memory" in out
    assert "USD" not in out  # no price in the table


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h100-sxn"], "did you mean 'h100-sxm'?"),
        (["--device", "a100-80", "--dtype", "fp8"], "no peak FLOP/s for dtype 'fp8'"),
        (["--train-batch", 0], "--train-batch: expected at least 1, got 0"),
        (["--hardware", "x.yaml"], "--hardware: give --device too"),
    ],
)
def test_cost_input_errors(capsys: pytest.CaptureFixture[str], contract: Path, words: list[object], said: str) -> None:
    code, out, err = run(capsys, "cost", contract / "spec-uniform.yaml", *words)
    assert code == 2 and out == "" and said in err
