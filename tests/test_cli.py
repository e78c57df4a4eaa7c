"""The command line as people and scripts meet it: exit codes, one JSON object, words instead of tracebacks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scantling.cli import app, main

ROOT = Path(__file__).parent.parent
LLAMA = ROOT / "tests/data/hf/llama-3-8b.json"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_check(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    found = run_json(capsys, "check", contract / "spec-per-layer.yaml")
    assert len(found["hash"]) == 64
    assert (
        found["layers"][2] | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "v_head_dim": 24}
        == found["layers"][2]
    )
    assert found["layers"][0]["ffn"]["kind"] == "dense"
    code, out, _ = run(capsys, "check", contract / "spec-bowtie-200m.yaml")
    assert code == 0 and "hidden_size: [1152, 960, 832" in out


def test_check_output_is_itself_a_spec(capsys: pytest.CaptureFixture[str], contract: Path, tmp_path: Path) -> None:
    _, out, _ = run(capsys, "check", contract / "spec-low-rank.yaml")
    (tmp_path / "resolved.yaml").write_text(out)
    first = run_json(capsys, "check", contract / "spec-low-rank.yaml")
    assert run_json(capsys, "check", tmp_path / "resolved.yaml") == first


def test_five_faults_exit_2(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    code, out, err = run(capsys, "check", contract / "spec-five-faults.yaml")
    assert code == 2 and out == "" and len(err.splitlines()) == 5
    assert "Traceback" not in err and "did you mean 'tie_word_embeddings'?" in err


def test_cost_of_llama(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "cost", LLAMA, "--context", 131072, "--dtype", "bf16")
    assert found["params"]["total"] == 8030261248
    assert found["weight_bytes"] == 16060522496
    assert (found["kv_cache_bytes_per_token"], found["kv_cache_bytes"]) == (131072, 17179869184)
    assert found["flops_per_token"]["decode"] == 83728793600
    assert {"forward", "train", "decode", "prefill"} <= set(found["flops_per_token"])
    assert found["conventions"]["decode"]


def test_cost_side_by_side(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    found = run_json(capsys, "cost", contract / "spec-uniform.yaml", contract / "spec-low-rank.yaml", "--context", 64)
    assert [model["params"]["total"] for model in found["models"]] == [758912, 19303680]
    code, out, _ = run(capsys, "cost", contract / "spec-uniform.yaml", contract / "spec-low-rank.yaml")
    assert code == 0 and "758,912" in out and "19,303,680" in out


def test_set_overrides(capsys: pytest.CaptureFixture[str], contract: Path) -> None:
    found = run_json(
        capsys, "check", contract / "spec-uniform.yaml", "--set", "num_hidden_layers=2", "--set", "vocab_size=1e3"
    )
    assert len(found["layers"]) == 2 and found["vocab_size"] == 1000
    code, _, err = run(capsys, "check", contract / "spec-uniform.yaml", "--set", "num_key_value_heads=3")
    assert code == 2 and err.startswith("--set num_key_value_heads: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cots", "x"], 'Did you mean "cost"?'),
        (["cost", "x.yaml", "--contxt", "3"], "Did you mean --context"),
        (["cost", "x.yaml", "--context", "four"], "four"),
        (["cost", "nofile.yaml"], "nofile.yaml: no such file"),
        (["cost", "README.md", "--dtype", "bf17"], "dtype: unknown 'bf17'"),
        (["predict", "chinchilla-epoc", "--params", "1", "--tokens", "1"], "did you mean 'chinchilla-epoch'"),
        (["predict", "chinchilla-epoch", "--params", "7 quux", "--tokens", "1"], "--params"),
        (["predict", "chinchilla-epoch"], "needs --params and --tokens"),
        (["fit", "nofile.csv"], "nofile.csv"),
        (["report"], "path"),
        (["plan", "nofile.yaml"], "nofile.yaml"),
        (["generate", "nofolder"], "nofolder"),
        (["study", "tests/data/contract/run-tiny.yaml"], "families: required key is missing"),
        (["train", "tests/data/contract/spec-uniform.yaml"], "required section model is missing"),
    ],
)
def test_wrong_input_exits_2_with_a_sentence(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2, err
    assert said in err.replace("\n", " ") and "Traceback" not in err and out == ""


def test_predict(capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "predict", "chinchilla-epoch-huber", "--params", "70B", "--tokens", "1.4e12")
    assert found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(1.9734, abs=2e-3)
    best = run_json(capsys, "predict", "chinchilla-epoch", "--compute", "1e21")
    assert best["optimal_params"]["value"] == pytest.approx(2.7785e9, rel=2e-3)
    assert best["low"] is None and any("no interval" in note for note in best["notes"])


def test_fit_of_a_csv(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = ["N,D,loss"] + [
        f"{n:g},{n * m:g},{1.8 + 400 * n**-0.34 + 2000 * (n * m) ** -0.37:.6f}"
        for n in (1e7, 3e7, 1e8, 3e8)
        for m in (10, 20, 80)
    ]
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    found = run_json(capsys, "fit", tmp_path / "runs.csv", "--law", "chinchilla", "--out", tmp_path / "law.json")
    assert found["params"]["alpha"] == pytest.approx(0.34, abs=0.01) and found["n"] == 12
    assert {"params", "intervals", "objective", "n", "warnings", "hold_out"} <= set(found)
    again = run_json(capsys, "predict", tmp_path / "law.json", "--params", "1e8", "--tokens", "2e9")
    assert again["value"] == pytest.approx(1.8 + 400 * 1e8**-0.34 + 2000 * 2e9**-0.37, rel=1e-4)


@pytest.mark.parametrize("kind", ["spec", "run", "study", "plan"])
def test_init_writes_a_file_its_verb_accepts(capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    target = tmp_path / f"{kind}.yaml"
    assert run(capsys, "init", kind, "--out", target)[0] == 0
    if kind == "spec":
        run_json(capsys, "check", target)
    elif kind == "run":
        from scantling.config import load_run

        load_run(target)
    elif kind == "study":
        run_json(capsys, "study", target, "--dry-run", "--out", tmp_path / "s")
    else:
        run_json(capsys, "plan", target)
    code, _, err = run(capsys, "init", kind, "--out", target)
    assert code == 2 and "exists already" in err


def test_every_option_has_help() -> None:
    """A docstring section in the wrong style silently yields no help (cyclopts)."""
    for name in app:
        if name.startswith("-"):
            continue
        for argument in app[name].assemble_argument_collection(parse_docstring=True):
            assert argument.parameter.help, f"{name} {argument.name} has no help"


def test_module_and_script_are_one(contract: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scantling", "check", str(contract / "spec-five-faults.yaml")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 5
