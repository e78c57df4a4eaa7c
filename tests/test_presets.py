"""Published models as specs: every file of examples/specs has the parameter count its source gives."""

from pathlib import Path

import pytest

from scantling.costing import cost
from scantling.resolve import load_spec
from scantling.spec import ModelSpec

FOLDER = Path(__file__).parent.parent / "examples/specs"

# file: (count, value, source). A whole number must be equal; a text must be equal to the digits printed.
# Counts beside those of `costing.param_counts`: `matrices` all weights but norms, biases and mixing weights;
# `active_matrices` the same of what one token uses; `less_qk_norm` all but the gains of the query/key norm.
BOWTIE = "arXiv 2606.18246, the tensors its released configuration allocates"
BASELINE = "arXiv 2606.18246, the matched parameters of the uniform baseline, norm gains left out"
GQA = "cost-optimal GQA, Table 9: 4 L d^2 + 3 L d d_ff, without embeddings and norms"
PLOTTED = "cost-optimal GQA, the plotted family: 8 L d^2 + 2 L d 64 (n_h + n_kv), here with a whole d_ff"
STRUCTURED = "arXiv 2406.16450, sections 4 and 5: total with biases and norms, tied embedding once"
VARIANTS_A = "arXiv 2404.14462 v1, its released code at a vocabulary of 2117; printed as 8.82M, 9.74M, 5.65M"
VARIANTS_B = "arXiv 2404.14462 v3/v4, its released code"
OVERTRAIN = "arXiv 2403.08540, Table 3 and its records: all weights but the gains of qk-norm"

PUBLISHED: dict[str, tuple[str, int | str, str]] = {
    "bowtie-200m": ("total", 237_637_504, BOWTIE),
    "bowtie-500m": ("total", 553_716_704, BOWTIE),
    "bowtie-1b": ("total", 1_116_007_840, BOWTIE),
    "bowtie-2b": ("total", 1_986_834_592, BOWTIE),
    "bowtie-3b-moe": ("total", 2_936_190_112, BOWTIE),
    "bowtie-200m-uniform": ("matrices", 233_194_240, BASELINE),
    "bowtie-500m-uniform": ("matrices", 546_399_360, BASELINE),
    "bowtie-1b-uniform": ("matrices", 1_095_534_080, BASELINE),
    "bowtie-2b-uniform": ("matrices", 1_959_241_600, BASELINE),
    "bowtie-3b-moe-uniform": ("matrices", 2_894_537_600, BASELINE),
    "gqa-3m-mha": ("matmul_non_embedding", "3.11e6", GQA),
    "gqa-19m-mha": ("matmul_non_embedding", "1.90e7", GQA),
    "gqa-85m-mha": ("matmul_non_embedding", "8.49e7", GQA),
    "gqa-150m-mha": ("matmul_non_embedding", "1.51e8", GQA),
    "gqa-200m-mha": ("matmul_non_embedding", "2.01e8", GQA),
    "gqa-470m-mha": ("matmul_non_embedding", "4.73e8", GQA),
    "gqa-680m-mha": ("matmul_non_embedding", "6.79e8", GQA),
    "gqa-1.2b-mha": ("matmul_non_embedding", "1.02e9", GQA),
    "gqa-6x768-h32kv8": ("matmul_non_embedding", 8 * 6 * 768**2 + 2 * 6 * 768 * 64 * 40, PLOTTED),
    "gqa-6x768-h8kv1": ("matmul_non_embedding", 8 * 6 * 768**2 + 2 * 6 * 768 * 64 * 9, PLOTTED),
    "gqa-16x2048-h32kv8": ("matmul_non_embedding", "7.046e8", PLOTTED),
    "gqa-16x2048-h8kv1": ("matmul_non_embedding", "5.746e8", PLOTTED),
    "structured-s-dense": ("total", "1.0963e8", STRUCTURED),
    "structured-s-low-rank-63": ("total", "9.017e7", STRUCTURED),
    "structured-s-block-dense-63": ("total", "9.017e7", STRUCTURED),
    "structured-s-block-shuffle-63": ("total", "9.017e7", STRUCTURED),
    "structured-s-low-rank-32": ("total", "7.395e7", STRUCTURED),
    "structured-s-block-dense-32": ("total", "7.395e7", STRUCTURED),
    "structured-s-block-shuffle-32": ("total", "7.395e7", STRUCTURED),
    "structured-m-dense": ("total", "3.3508e8", STRUCTURED),
    "structured-m-low-rank-63": ("total", "2.6273e8", STRUCTURED),
    "structured-m-block-dense-63": ("total", "2.5519e8", STRUCTURED),
    "structured-m-block-shuffle-63": ("total", "2.6273e8", STRUCTURED),
    "structured-m-low-rank-32": ("total", "2.0243e8", STRUCTURED),
    "structured-m-block-dense-32": ("total", "1.9867e8", STRUCTURED),
    "structured-m-block-shuffle-32": ("total", "2.0243e8", STRUCTURED),
    "structured-m-wide": ("total", "2.19e8", STRUCTURED),
    "structured-l-dense": ("total", "7.2911e8", STRUCTURED),
    "structured-l-low-rank-63": ("total", "5.6632e8", STRUCTURED),
    "structured-l-block-dense-63": ("total", "5.6632e8", STRUCTURED),
    "structured-l-block-shuffle-63": ("total", "5.6632e8", STRUCTURED),
    "structured-l-low-rank-32": ("total", "4.3066e8", STRUCTURED),
    "structured-l-block-dense-32": ("total", "4.3066e8", STRUCTURED),
    "structured-l-block-shuffle-32": ("total", "4.3066e8", STRUCTURED),
    "structured-l-wide": ("total", "4.64e8", STRUCTURED),
    "structured-xl-dense": ("total", "1.27414e9", STRUCTURED),
    "structured-xl-low-rank-63": ("total", "9.8473e8", STRUCTURED),
    "structured-xl-block-dense-63": ("total", "9.5459e8", STRUCTURED),
    "structured-xl-block-shuffle-63": ("total", "9.8473e8", STRUCTURED),
    "structured-xl-low-rank-32": ("total", "7.4356e8", STRUCTURED),
    "structured-xl-block-dense-32": ("total", "7.2849e8", STRUCTURED),
    "structured-xl-block-shuffle-32": ("total", "7.4356e8", STRUCTURED),
    "variants-a-gpt": ("total", 8_824_133, VARIANTS_A),
    "variants-a-parallel": ("total", 9_735_366, VARIANTS_A),
    "variants-a-linear": ("total", 5_647_685, VARIANTS_A),
    "variants-a-conv": ("total", 5_647_685, VARIANTS_A),
    "variants-b0-gpt": ("total", 10_775_424, VARIANTS_B),
    "variants-b0-parallel-split": ("total", 10_901_377, VARIANTS_B),
    "variants-b0-compress": ("total", 4_874_112, VARIANTS_B),
    "variants-b1-gpt": ("total", 77_210_112, VARIANTS_B),
    "variants-b1-parallel-split": ("total", 103_490_049, VARIANTS_B),
    "variants-b1-parallel": ("total", 77_735_425, VARIANTS_B),
    "variants-b1-compress": ("total", 36_423_936, VARIANTS_B),
    "variants-b2-gpt": ("total", 163_007_232, VARIANTS_B),
    "variants-b2-parallel": ("total", 164_188_417, VARIANTS_B),
    "variants-b2-compress": ("total", 59_293_248, VARIANTS_B),
    "overtrain-0.011b": ("less_qk_norm", 10_569_312, OVERTRAIN),
    "overtrain-0.079b": ("less_qk_norm", 78_914_048, OVERTRAIN),
    "overtrain-0.154b": ("less_qk_norm", 153_677_376, OVERTRAIN),
    "overtrain-0.411b": ("less_qk_norm", 411_616_256, OVERTRAIN),
    "overtrain-1.4b": ("less_qk_norm", 1_439_795_200, OVERTRAIN),
    "overtrain-6.9b": ("less_qk_norm", 6_889_410_560, OVERTRAIN),
}


def preset(name: str) -> ModelSpec:
    return load_spec(FOLDER / f"{name}.yaml")


def counts(spec: ModelSpec) -> dict[str, int]:
    """`param_counts` and the counts that only a source here uses."""
    price = cost(spec)
    norms = sum(row.params for row in price.rows if row.component == "norm")
    qk_gains = sum(2 * layer.num_attention_heads * layer.head_dim for layer in spec.layers if layer.qk_norm is not None)
    return {
        **price.params,
        "matrices": price.params["total"] - norms,
        "active_matrices": price.params["active"] - norms,
        "less_qk_norm": price.params["total"] - qk_gains,
    }


def as_printed(value: int, printed: str) -> str:
    """`value` with as many digits as `printed`, in its form: 3112960 like 3.11e6 is 3.11e6."""
    mantissa, exponent = printed.split("e")
    places = len(mantissa.partition(".")[2])
    return f"{value / 10 ** int(exponent):.{places}f}e{exponent}"


def test_every_preset_is_in_the_table() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in PUBLISHED}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_count(name: str) -> None:
    count, published, source = PUBLISHED[name]
    value = counts(preset(name))[count]
    found = as_printed(value, published) if isinstance(published, str) else value
    assert found == published, source


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_header_names_the_source(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ") and ("arXiv" in first or "Cost-optimal GQA" in first)


def test_the_bowtie_keeps_its_released_widths_and_scales() -> None:
    spec = preset("bowtie-200m")
    assert spec.widths == (1152, 960, 832, 704, 608, 512, 448, 352, 320, 256, 224, 192, 288, 480, 736, 1152)
    assert (spec.embedding_size, spec.unembedding_size) == (640, 640)
    assert (spec.embedding_multiplier, spec.logits_scaling, spec.initialization.kind) == (12, 8, "mup")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("bowtie")])
def test_bowtie_scales_are_one_over_head_dim(name: str) -> None:
    for layer in preset(name).layers:
        assert layer.attention_multiplier == pytest.approx(1 / layer.head_dim, rel=1e-15)
        assert layer.residual_multiplier == 0.22


def test_the_mixture_of_experts_has_the_released_expert_sizes_and_active_parameters() -> None:
    released = (
        "973 911 850 799 748 707 666 625 584 543 512 481 451 420 399 369 348 328 307 287 276 256 236 225 215 195 184 174 164 154 "
        "184 225 266 317 389 461 553 666 809 973"
    )
    sizes = [layer.ffn.expert.intermediate_size for layer in preset("bowtie-3b-moe").layers]
    assert sizes == [int(size) for size in released.split()]
    assert as_printed(counts(preset("bowtie-3b-moe-uniform"))["active_matrices"], "1.02676e9") == "1.02676e9"


def test_one_path_of_the_parallel_models() -> None:
    """Without the second stack: 6,186,438 (setup A, printed as 6.19M) and 121,121,281 (setup B2)."""
    for name, one_path in (("variants-a-parallel", 6_186_438), ("variants-b2-parallel", 121_121_281)):
        spec = preset(name)
        assert spec.branches is not None
        depth = len(spec.layers) // spec.branches.count
        second = sum(row.params for row in cost(spec).rows if row.layer is not None and row.layer >= depth)
        entry = spec.embedding_size * (spec.embedding_size + 1) if spec.branches.entry == "projection" else 0
        assert counts(spec)["total"] - second - entry == one_path
