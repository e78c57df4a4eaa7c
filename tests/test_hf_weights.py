"""Every supported class against transformers itself: random weights in and out, equal logits; and what goes wrong, in words."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scantling.cli import main
from scantling.errors import InputError
from scantling.hf_classes import MODEL_TYPES
from scantling.hf_folder import export_checkpoint, import_folder, imported_tokenizer, load_weights, open_checkpoint
from scantling.hf_weights import cast, correspondence, from_hf, main_dtype, to_hf
from scantling.hf_writer import to_hf_config
from scantling.resolve import spec_from
from scantling.spec import ModelSpec
from scantling.tensor_files import Held, Tensors, open_tensors, verify, write_tensors

transformers = pytest.importorskip("transformers")

VOCABULARY = 40
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {**COMMON, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        GQA,
        {**COMMON, "tie_word_embeddings": True, "hidden_act": "relu"},
        {**GQA, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
        {**GQA, "rope_scaling": LINEAR},
        {**GQA, "rope_scaling": YARN},
        {**GQA, "rope_scaling": LLAMA3, "rope_theta": 5e4},
    ],
    "mistral": [{**GQA, "sliding_window": 5}, {**GQA, "sliding_window": None, "num_key_value_heads": 1, "head_dim": 12}],
    "qwen2": [
        {**GQA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        {**GQA, "tie_word_embeddings": True, "head_dim": 16, "rope_scaling": YARN},
    ],
    "qwen3": [
        {**GQA, "head_dim": 16},
        {
            **GQA, "head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 7,
            "layer_types": ALTERNATING, "tie_word_embeddings": True,
        },
    ],
    "gemma": [
        {**GQA, "head_dim": 16, "num_key_value_heads": 1},
        {**GQA, "head_dim": 8, "attention_bias": True, "hidden_act": "gelu", "tie_word_embeddings": False},
    ],
    "gemma2": [
        {**GQA, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0},
        {
            **GQA, "head_dim": 8, "query_pre_attn_scalar": 24, "final_logit_softcapping": None,
            "attn_logit_softcapping": None, "sliding_window": 4, "layer_types": ALTERNATING[::-1],
        },
    ],
    "gpt2": [
        GPT2,
        {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "scale_attn_weights": False},
        {**GPT2, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"},
    ],
    "gpt_neox": [
        COMMON,
        {**COMMON, "rotary_pct": 1.0, "use_parallel_residual": False, "rope_scaling": LINEAR},
        {
            **COMMON, "rotary_pct": 0.5, "attention_bias": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast",
            "rotary_emb_base": 500,
        },
    ],
    "mixtral": [
        {**GQA, "num_local_experts": 4},
        {**GQA, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5, "head_dim": 16},
    ],
    "olmo2": [GQA, {**COMMON, "attention_bias": True, "rms_norm_eps": 1e-3}],
}  # fmt: skip
EACH = [(kind, at) for kind, cases in CASES.items() for at in range(len(cases))]
IDS = torch.arange(66).view(2, 33) * 7 % VOCABULARY


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.set_verbosity(before)
    transformers.utils.logging.enable_progress_bar()


@dataclass(frozen=True)
class Stock:
    """A folder as transformers saves it, what it says, and the class itself."""

    folder: Path
    model: Any
    spec: ModelSpec
    config: dict[str, Any]
    weights: Tensors  # under our names

    def logits(self, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.inference_mode():
            return self.model.to(dtype)(IDS, use_cache=False).logits  # type: ignore[no-any-return]


def stock(folder: Path, kind: str, at: int = 0, **save: Any) -> Stock:
    """Random weights of a size that makes every part count."""
    config = transformers.AutoConfig.for_model(kind, **CASES[kind][at])
    config._experts_implementation = "eager"  # the grouped one knows no float64
    torch.manual_seed(at)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.25)
    model.save_pretrained(folder, **save)
    written = json.loads((folder / "config.json").read_text())
    spec = spec_from(written)
    return Stock(folder, model, spec, written, from_hf(open_tensors(folder), written, spec))


def logits(spec: ModelSpec, weights: Tensors, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.inference_mode():
        return load_weights(spec, weights).to(dtype).eval()(IDS)


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def contents(folder: Path) -> dict[str, Tensor]:
    tensors = open_tensors(folder)
    return {name: tensors.tensor(name) for name in tensors.names}


# --- the same function -------------------------------------------------------------------------------------------------


def test_every_class_has_cases() -> None:
    assert set(CASES) == set(MODEL_TYPES)


@pytest.mark.parametrize(("kind", "at"), EACH)
def test_the_same_logits_in_and_out(kind: str, at: int, tmp_path: Path) -> None:
    source = stock(tmp_path / "in", kind, at)
    expected = source.logits()
    assert 0.5 < expected.abs().max() < 30
    torch.testing.assert_close(logits(source.spec, source.weights), expected, rtol=1e-5, atol=1e-5)

    back = to_hf_config(source.spec, kind)
    write_tensors(tmp_path / "out", to_hf(source.weights, source.spec, kind), max_shard_bytes=9000)
    (tmp_path / "out/config.json").write_text(json.dumps(back))
    again = loaded(tmp_path / "out")
    with torch.inference_mode():
        torch.testing.assert_close(again(IDS, use_cache=False).logits, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "in")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():  # Gemma's gains pass through 1 + w
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-7 if kind.startswith("gemma") else 0)

    # transformers keeps rotary angles, and most norms, in float32 whatever the weights are
    exact = 1e-12 if kind == "gpt2" else 1e-5
    torch.testing.assert_close(
        logits(source.spec, source.weights, torch.float64), source.logits(torch.float64), rtol=exact, atol=exact
    )


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_permuted_part_is_noticed(kind: str, tmp_path: Path) -> None:
    """Any two parameters of ours of the same shape change the logits when swapped, so equal logits prove the names."""
    source = stock(tmp_path, kind)
    held = {name: source.weights.tensor(name) for name in source.weights.names}
    expected = source.logits()
    names = [name for name in held if "layers.1" in name and "experts.1" not in name]
    swapped = 0
    for at, one in enumerate(names):
        other = next((name for name in names[at + 1 :] if held[name].shape == held[one].shape), None)
        if other is None:
            continue
        swapped += 1
        changed = logits(source.spec, Held({**held, one: held[other], other: held[one]}))
        assert (changed - expected).abs().max() > 1e-4, (one, other)
    assert swapped >= 2


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "llama"])
def test_names_of_the_bare_model_and_old_buffers(kind: str, tmp_path: Path) -> None:
    source = stock(tmp_path, kind)
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model."}[kind]
    old = {name.removeprefix(prefix): value for name, value in contents(tmp_path).items()}
    layer = "h.0.attn" if kind == "gpt2" else "layers.0.attention" if kind == "gpt_neox" else "layers.0.self_attn"
    old |= {f"{layer}.rotary_emb.inv_freq": torch.ones(4)}
    if kind != "llama":
        old |= {f"{layer}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool), f"{layer}.masked_bias": torch.tensor(-1e9)}
    found = from_hf(Held(old), source.config, source.spec)
    assert found.names == source.weights.names
    assert all(torch.equal(found.tensor(name), source.weights.tensor(name)) for name in found.names)


def test_a_tied_head_that_was_saved_is_dropped(tmp_path: Path) -> None:
    source = stock(tmp_path, "llama", 1)
    held = contents(tmp_path)
    assert source.spec.tie_word_embeddings and "lm_head.weight" not in held
    found = from_hf(Held({**held, "lm_head.weight": held["model.embed_tokens.weight"]}), source.config, source.spec)
    assert "lm_head.weight" not in found.names


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_tensor_of_theirs_is_accounted_for(kind: str, tmp_path: Path) -> None:
    source = stock(tmp_path, kind)
    pairs = list(correspondence(source.spec, kind))
    assert {pair.theirs for pair in pairs} == set(open_tensors(tmp_path).names)
    assert sorted(name for pair in pairs for name in pair.ours) == sorted(source.weights.names)


def test_bfloat16_stays_and_gains_of_gemma_are_kept_exactly(tmp_path: Path) -> None:
    source = stock(tmp_path / "in", "gemma2")
    source.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    weights = from_hf(open_tensors(tmp_path / "half"), source.config, source.spec)
    dtypes = {weights.dtype(name) for name in weights.names if not name.endswith("norm.weight")}
    assert dtypes == {torch.bfloat16} and weights.dtype("norm.weight") == torch.float32
    halves = open_tensors(tmp_path / "half")
    assert torch.equal(weights.tensor("norm.weight"), 1 + halves.tensor("model.norm.weight").float())
    back = to_hf(weights, source.spec, "gemma2")
    assert main_dtype(weights) == torch.bfloat16 and {back.dtype(name) for name in back.names} == {torch.bfloat16}
    for name in back.names:
        torch.testing.assert_close(back.tensor(name).float(), halves.tensor(name).float(), rtol=0, atol=1e-7)
    whole = cast(weights, torch.float64)
    assert {whole.tensor(name).dtype for name in whole.names} == {torch.float64}


# --- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("llama", "model.norm.weight", None, "missing; config.json asks for it"),
        ("llama", "lm_head.weight", None, "missing"),
        ("llama", "model.layers.3.mlp.up_proj.weight", torch.ones(2), "config.json has no place for it"),
        ("llama", "model.layers.0.self_attn.q_proj.bias", torch.ones(32), "config.json has no place for it"),
        ("llama", "model.norm.weight", torch.ones(31), "expected shape (32,), got (31,)"),
        (
            "llama",
            "model.norm.weight",
            torch.ones(32, dtype=torch.int8),
            "expected float64, float32, .* got torch.int8",
        ),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", torch.ones(96, 32), "expected shape (32, 96), got (96, 32)"),
        (
            "gpt_neox",
            "gpt_neox.layers.0.attention.query_key_value.bias",
            torch.ones(90),
            "expected shape (96,), got (90,)",
        ),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w2.weight", None, "missing"),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    kind: str, name: str, value: Tensor | None, said: str, tmp_path: Path
) -> None:
    source = stock(tmp_path, kind)
    held = {**contents(tmp_path), name: value}
    given = {name: tensor for name, tensor in held.items() if tensor is not None}
    pattern = f"{name}: {said}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(InputError, match=pattern):
        from_hf(Held(given), source.config, source.spec)


def test_a_wrong_config_names_some_faults_and_counts_the_rest(tmp_path: Path) -> None:
    source = stock(tmp_path, "llama")
    wrong = spec_from({**source.config, "hidden_size": 48, "head_dim": 12})
    with pytest.raises(InputError) as caught:
        from_hf(open_tensors(tmp_path), source.config, wrong)
    assert len(caught.value.faults) == 9 and caught.value.faults[-1].startswith("and ")


def test_weights_of_another_model_are_not_exported(tmp_path: Path) -> None:
    source = stock(tmp_path, "llama")
    fewer = spec_from({**source.config, "num_hidden_layers": 2})
    with pytest.raises(InputError, match=r"layers.2.*: expected shape None, got .*; not the weights of this model"):
        to_hf(source.weights, fewer, "llama")
    with pytest.raises(InputError, match="gpt2 cannot express this model"):
        to_hf(source.weights, source.spec, "gpt2")


# --- folders -----------------------------------------------------------------------------------------------------------


CARRIED = [
    "chat_template.jinja", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip


def add_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 38 ids and what goes with one."""
    import tokenizers
    from tokenizers.processors import TemplateProcessing

    letters = {letter: at + 2 for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz .,;:!?-()")}
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"<s>": 0, "</s>": 1, **letters}, []))
    library.add_special_tokens(["<s>", "</s>"])
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    library.decoder = tokenizers.decoders.Fuse()
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "bos_token_id": 0, "eos_token_id": [1, 3], "mine": 7}))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_folder_through_a_checkpoint_and_back(kind: str, tmp_path: Path) -> None:
    source = stock(tmp_path / "in", kind, max_shard_size="30KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    add_tokenizer(tmp_path / "in")
    receipt = import_folder(tmp_path / "in", tmp_path / "ours")
    assert receipt.logit_difference is not None and receipt.logit_difference < 1e-5 < receipt.largest_logit  # type: ignore[operator]
    assert receipt.parameters == source.model.num_parameters() and receipt.model_type == kind
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "hugging_face", "model.safetensors", "spec.json", "state.json",
    ]  # fmt: skip

    again = export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert again.logit_difference is not None and again.logit_difference < 1e-5 and again.model_type == kind
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "in/config.json").read_text()
    )
    for name in CARRIED:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes(), name
    assert not (tmp_path / "out/modeling_evil.py").exists()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= verify(tmp_path / "out").keys()
    with torch.inference_mode():
        torch.testing.assert_close(loaded(tmp_path / "out")(IDS, use_cache=False).logits, source.logits())


def test_export_in_another_dtype(tmp_path: Path) -> None:
    stock(tmp_path / "in", "gemma")
    import_folder(tmp_path / "in", tmp_path / "ours", compare=False)
    receipt = export_checkpoint(tmp_path / "ours", tmp_path / "out", "bf16")
    assert (
        receipt.dtypes == ["bfloat16"] and json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    )
    assert receipt.logit_difference is not None and 1e-4 < receipt.logit_difference < 0.5  # rounding, told as it is
    assert loaded(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(InputError, match="--dtype: expected one of .*, got int8"):
        export_checkpoint(tmp_path / "ours", tmp_path / "again", "int8")


def test_a_model_no_class_can_express_is_exported_as_a_checkpoint(tmp_path: Path) -> None:
    source = stock(tmp_path / "in", "llama")
    import_folder(tmp_path / "in", tmp_path / "ours", compare=False)
    folder = tmp_path / "ours"
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "spec.json").write_text(json.dumps({**spec, "residual_multiplier": 0.5}))
    with pytest.raises(InputError, match=r"spec.json: expected sha256 .* altered or damaged"):
        export_checkpoint(folder, tmp_path / "out")
    state = json.loads((folder / "state.json").read_text())
    del state["sha256"]["spec.json"]
    (folder / "state.json").write_text(json.dumps(state))
    receipt = export_checkpoint(folder, tmp_path / "out")
    assert receipt.model_type is None and receipt.logit_difference is None and receipt.not_compared
    assert "3 layers from layer 0 on: residual_multiplier is 0.5 here, 1.0 in llama" in str(receipt.why_own_format)
    changed, weights = open_checkpoint(tmp_path / "out")
    assert changed.layers[0].residual_multiplier == 0.5
    assert all(torch.equal(weights.tensor(name), source.weights.tensor(name)) for name in weights.names)


def test_the_difference_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong transpose, with the right shape, shows in the receipt."""
    stock(tmp_path / "in", "gpt2")
    from scantling.hf_weights import Stacked

    monkeypatch.setattr(
        Stacked, "split", lambda self, theirs, at: theirs.view(theirs.shape[::-1]).chunk(self.count)[at]
    )
    receipt = import_folder(tmp_path / "in", tmp_path / "ours")
    assert receipt.logit_difference is not None and receipt.logit_difference > 0.1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; expected a folder as save_pretrained"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "mamba"}'), "expected one of llama"),
        (lambda folder: (folder / "model.safetensors").unlink(), "expected model.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "a pickle"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "not a safetensors file"),
        (lambda folder: save_file({}, folder / "model.safetensors"), "embed_tokens.weight: missing"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5]),
            "cut short",
        ),
    ],
)
def test_a_damaged_source_leaves_nothing(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    stock(tmp_path / "in", "llama")
    damage(tmp_path / "in")
    with pytest.raises(InputError, match=said):
        import_folder(tmp_path / "in", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --- verbs -------------------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return int(end.value.code or 0)


def test_import_generate_evaluate_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock(tmp_path / "in", "qwen3")
    add_tokenizer(tmp_path / "in")
    assert run("import", tmp_path / "in", "--out", tmp_path / "ours", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["logit_difference"] < 1e-5 and said["not_compared"] is None and said["model_type"] == "qwen3"
    assert run("import", tmp_path / "in", "--out", tmp_path / "ours") == 2
    assert "exists already" in capsys.readouterr().err

    assert (
        run("generate", tmp_path / "ours", "--prompt", "abc", "--temperature", 0, "--max-new-tokens", 6, "--json") == 0
    )
    text = json.loads(capsys.readouterr().out)["text"]
    tokenizer = imported_tokenizer(tmp_path / "ours")
    assert tokenizer is not None and tokenizer.end_of_document == 1
    prompt = [0, *tokenizer.encode("abc").tolist()]  # with the beginning that the model's own tokenizer puts
    model = loaded(tmp_path / "in")
    theirs = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=1, pad_token_id=1)
    expected = tokenizer.decode(theirs[0, len(prompt) :].numpy()).removesuffix("</s>")
    assert text == expected and expected

    (tmp_path / "text.txt").write_text("the quick brown fox, and a dog.\n".replace("\n", " ") * 300)
    assert run("evaluate", tmp_path / "ours", "--data", tmp_path / "text.txt", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["validation_loss"] > 3 and found["bits_per_byte"] > 3
    assert run("evaluate", tmp_path / "ours") == 2
    assert "--data goes with an imported checkpoint" in capsys.readouterr().err

    assert run("export", tmp_path / "ours", "--out", tmp_path / "out", "--dtype", "bf16", "--no-compare") == 0
    out = capsys.readouterr().out
    assert "a qwen3 model" in out and "logits not compared: not asked for" in out and "tokenizer.json" in out
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_a_run_is_exported_for_transformers(tmp_path: Path) -> None:
    """Its newest checkpoint, with the averaged weights it kept."""
    from scantling.training import train
    from tests.runs import newest, tiny, write_corpus

    uniform = {"hidden_size": 16, "num_hidden_layers": 2, "transition": None}
    config = tiny(write_corpus(tmp_path / "text.jsonl"), uniform, average_decay=0.9)
    train(config, tmp_path / "run", quiet=True)
    averaged = load_file(newest(tmp_path / "run") / "average.safetensors")
    receipt = export_checkpoint(tmp_path / "run", tmp_path / "out")
    assert receipt.model_type == "llama" and receipt.logit_difference is not None and receipt.logit_difference < 1e-5
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(open_tensors(tmp_path / "out").tensor(name), averaged[name.removeprefix("model.")])
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(InputError, match="expected a checkpoint folder or a run folder with checkpoints"):
        export_checkpoint(tmp_path / "run", tmp_path / "again")
