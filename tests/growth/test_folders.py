"""The command on real folders: stock Hugging Face models in and out, our checkpoints with their optimizers, and faults."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scantling import checkpoint
from scantling.checkpoint import optimizer_tensors, weights_of
from scantling.errors import InputError, RunError
from scantling.growth import Policy, grow, grow_folder, grown_state, path
from scantling.growth.receipt import new_entries
from scantling.growth.weights import applied
from scantling.hf_folder import load_weights
from scantling.model import Decoder
from scantling.resolve import load_spec, spec_from, to_yaml
from scantling.spec import ModelSpec
from scantling.tensor_files import Held, open_tensors
from tests.growth.growing import random_model, some_ids

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
WIDER: dict[str, Any] = {"hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 4, "num_attention_heads": 6}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", SIZES, WIDER),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 8}, WIDER),
    "qwen2": ("Qwen2", SIZES, WIDER),
    "qwen3": ("Qwen3", SIZES, WIDER),
    "gemma": ("Gemma", SIZES, WIDER),
    "gemma2": (
        "Gemma2",
        {**SIZES, "query_pre_attn_scalar": 8, "num_hidden_layers": 2},
        WIDER,
    ),
    "gpt2": ("GPT2", GPT2, {"n_embd": 48, "n_head": 6, "n_inner": 60, "n_layer": 3}),
    "gpt_neox": (
        "GPTNeoX",
        {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")},
        WIDER,
    ),
    "olmo2": (
        "Olmo2",
        {key: value for key, value in SIZES.items() if key != "head_dim"},
        {"intermediate_size": 60, "num_hidden_layers": 4},  # norms over all heads: heads and their sizes stay
    ),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}, WIDER),
}


def stock(folder: Path, family: str, max_shard_size: str = "5GB", **more: Any) -> Any:
    """A random model of the real class, saved as people save it; every gain and bias is random too."""
    name, sizes, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{name}Config")(**sizes, **more)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def config_to(folder: Path, changes: dict[str, Any]) -> Path:
    """The config of a folder with other sizes, as a person would write it."""
    config = json.loads((folder / "config.json").read_text())
    if "layer_types" in config:
        depth = changes.get("num_hidden_layers", config["num_hidden_layers"])
        config["layer_types"] = (config["layer_types"] * depth)[:depth]
    target = folder.parent / "target.json"
    target.write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_in_and_out(family: str, tmp_path: Path) -> None:
    model = stock(tmp_path / "old", family)
    target = config_to(tmp_path / "old", FAMILIES[family][2])
    receipt = grow_folder(tmp_path / "old", target, tmp_path / "new")
    assert receipt.format == "hugging_face", receipt.why_own_format
    assert receipt.logit_difference is not None and receipt.largest_logit is not None
    assert receipt.logit_difference["float64"] < 1e-10 * max(1, receipt.largest_logit)
    assert receipt.params_after > receipt.params_before and receipt.exact
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert type(grown) is type(model) and sum(p.numel() for p in grown.parameters()) > sum(
        p.numel() for p in model.parameters()
    )
    ids = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = model(ids).logits, grown(ids).logits
    assert (before - after).abs().max() < 1e-5 * max(1.0, before.abs().max().item())


def test_a_target_no_class_can_express_becomes_a_checkpoint_of_ours(tmp_path: Path) -> None:
    stock(tmp_path / "old", "llama")
    spec = load_spec(tmp_path / "old" / "config.json")
    first = spec.layers[0]
    layers = (first.replace(ffn=first.ffn.replace(intermediate_size=64)), *spec.layers[1:])  # type: ignore[union-attr]
    (tmp_path / "to.yaml").write_text(to_yaml(spec.replace(layers=layers)))
    receipt = grow_folder(tmp_path / "old", tmp_path / "to.yaml", tmp_path / "new")
    assert receipt.format == "scantling" and receipt.why_own_format
    loaded = checkpoint.load(tmp_path / "new")
    assert loaded.spec.layers[0].ffn.intermediate_size == 64  # type: ignore[union-attr]
    assert json.loads((tmp_path / "new" / "growth.json").read_text())["max_abs_logit_difference"] < 1e-10


SPEC: dict[str, Any] = {
    "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 24, "rms_norm_eps": 1e-5, "max_position_embeddings": 32,
}  # fmt: skip
TARGETS: dict[str, dict[str, Any]] = {
    "mlp": {"intermediate_size": 31},
    "heads": {"num_attention_heads": 6},
    "groups": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "value": {"v_head_dim": 11},
    "key": {"head_dim": 12, "v_head_dim": 8, "position": {"kind": "rope", "frequency_size": 8}},
    "hidden, gain": {"hidden_size": 24, "rms_norm_eps": 1e-5 * 16 / 24},
    "hidden, writer": {"hidden_size": 24},
    "hidden, statistic": {
        "hidden_size": 24, "rms_norm_eps": None, "norm": {"kind": "rms_norm", "eps": 1e-5, "statistic_size": 16},
    },
    "layer": {"num_hidden_layers": 4},
    "everything": {
        "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4, "v_head_dim": 9,
        "num_hidden_layers": 3,
    },
}  # fmt: skip


def trained(spec: ModelSpec, steps: int = 3) -> tuple[Decoder, torch.optim.AdamW]:
    """A model whose optimizer has seen a few batches."""
    model = random_model(spec).train()
    optimizer = adam(model)
    for seed in range(steps):
        update(model, optimizer, seed)
    return model, optimizer


def adam(model: Decoder) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-30, weight_decay=0.0)


def update(model: Decoder, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = some_ids(model.spec, seed, (4, 16)) % 29
    optimizer.zero_grad()
    torch.autograd.backward(model.loss(ids, ids.roll(-1, 1)))
    optimizer.step()


@pytest.mark.parametrize("name", TARGETS)
def test_old_entries_take_the_same_step(name: str) -> None:
    """With moments grown alongside, one step moves every old entry by what it would have moved before."""
    spec, target = spec_from(SPEC), spec_from({**SPEC, **TARGETS[name]})
    model, optimizer = trained(spec)
    steps = list(path(spec, target, Policy(new_layers="random")))
    grown = grow(model, target, Policy(new_layers="random")).train()
    later = adam(grown)
    checkpoint.restore_optimizer(grown, [later], grown_state(optimizer_tensors(model, [optimizer]), steps))
    before, start = (_copied(each) for each in (model, grown))
    update(model, optimizer, 9)
    update(grown, later, 9)
    moved = Held({key: value - before[key] for key, value in _copied(model).items()})
    unscaled = [dataclasses.replace(step, scales={}) for step in steps]
    expected = applied(moved, unscaled, Policy(), "first")
    fresh = new_entries(steps, moved)
    after = _copied(grown)
    for key in expected.names:
        old = ~fresh[key]
        wanted, got = expected.tensor(key)[old], (after[key] - start[key])[old]
        assert (wanted - got).abs().max() < 1e-6 * 1e-3 or (wanted - got).abs().max() < 1e-9, key


def _copied(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights_of(model)[0].items()}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_new_is_dead(name: str, tmp_path: Path) -> None:
    spec, target = spec_from(SPEC), spec_from({**SPEC, **TARGETS[name]})
    save(tmp_path / "run", spec)
    (tmp_path / "to.yaml").write_text(to_yaml(target))
    receipt = grow_folder(tmp_path / "run", tmp_path / "to.yaml", tmp_path / "new")
    assert receipt.liveness is not None and receipt.liveness > 0.999


def save(root: Path, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Path:
    """A run folder with one checkpoint, optimizer state included."""
    model, optimizer = trained(spec)
    model = model.to(dtype)
    weights, _ = weights_of(model)
    groups = {"model": weights, "optimizer": optimizer_tensors(model, [optimizer])}
    return checkpoint.save(root / "checkpoints", 3, spec, groups, {"run": "x"}, 2)


def test_a_checkpoint_grows_with_its_optimizer(tmp_path: Path) -> None:
    spec, target = spec_from(SPEC), spec_from({**SPEC, **TARGETS["everything"]})
    source = save(tmp_path / "run", spec)
    kept = {file.name: file.read_bytes() for file in source.iterdir()}
    (tmp_path / "to.yaml").write_text(to_yaml(target))
    receipt = grow_folder(tmp_path / "run", tmp_path / "to.yaml", tmp_path / "new")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == kept
    loaded = checkpoint.load(tmp_path / "new")
    assert loaded.spec.dump() == target.dump()
    (parent,) = loaded.state["parents"]
    assert parent["spec_hash"] == spec.hash and parent["steps"] == loaded.state["step"] == 3
    model = load_weights(target, Held(loaded.group("model")), torch.float32)
    shapes = {name: tuple(value.shape) for name, value in weights_of(model)[0].items()}
    for name, value in loaded.group("optimizer").items():
        key, _, owner = name.partition(".")
        assert value.shape == (() if key == "step" else shapes[owner])
        assert key != "exp_avg_sq" or (value >= 0).all()
    checkpoint.restore_optimizer(model, [adam(model)], loaded.group("optimizer"))
    assert receipt.logit_difference is not None and receipt.logit_difference["float64"] < 1e-10


def refused(tmp_path: Path, source: Path, changes: dict[str, Any], error: type[Exception] = InputError) -> str:
    """The sentence of a growth that must not happen; nothing is left of it."""
    (tmp_path / "to.yaml").write_text(to_yaml(spec_from({**SPEC, **changes})))
    with pytest.raises(error) as caught:
        grow_folder(source, tmp_path / "to.yaml", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    return str(caught.value)


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "run", spec_from(SPEC))
    assert "expected at least 24" in refused(tmp_path, tmp_path / "run", {"intermediate_size": 20})
    assert "expected a checkpoint folder" in refused(tmp_path, tmp_path / "nothing", {})
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr("scantling.hf_folder.write_shards", full)
        refused(tmp_path, tmp_path / "run", {"intermediate_size": 30}, RunError)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(damaged)
        assert "model.safetensors" in refused(tmp_path, tmp_path / "run", {"intermediate_size": 30})


@pytest.mark.parametrize(
    ("name", "changes", "alternative"),
    [
        ("rotary", {"head_dim": 12, "v_head_dim": 8}, "frequency_size: 8"),
        ("eps", {"hidden_size": 24, "rms_norm_eps": 1e-6}, "gain form"),
        ("kv heads", {"num_key_value_heads": 1}, "expected"),
        ("experts unnormalised", {"ffn": {"kind": "moe", "num_local_experts": 2, "num_experts_per_tok": 1, "router_softmax":
            "before", "norm_topk_prob": False, "expert": {"kind": "dense"}}}, "norm_topk_prob: true"),
        ("structure", {"ffn": {"kind": "low_rank", "rank": 4}}, "cannot become low_rank exactly"),
        ("depth", {"num_hidden_layers": 1}, "expected at least 2"),
        ("window", {"sliding_window": 4}, "expected"),
    ],
)  # fmt: skip
def test_impossible_targets_name_an_exact_one(name: str, changes: dict[str, Any], alternative: str) -> None:
    with pytest.raises(InputError, match="cannot grow exactly") as caught:
        path(spec_from(SPEC), spec_from({**SPEC, **changes}))
    assert alternative in str(caught.value)


def test_missing_tensors_and_wrong_dtypes_of_stock_folders(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stock(tmp_path / "old", "llama")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    target = config_to(tmp_path / "old", {"intermediate_size": 60})
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    with pytest.raises(InputError, match="up_proj"):
        grow_folder(tmp_path / "old", target, tmp_path / "new")
    save_file({**tensors, name: tensors[name].to(torch.int32)}, file)
    with pytest.raises(InputError, match="up_proj"):
        grow_folder(tmp_path / "old", target, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert open_tensors(file).names
