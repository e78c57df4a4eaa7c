"""Studies that a plan asks for: a small ladder of its shapes, as the YAML that `scantling study` runs.

The ladder keeps the plan's aspect ratio, head size and feed-forward ratio and is much smaller; what `scantling fit` makes of
its table plugs into the next plan as `law:`.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from scantling.errors import InputError
from scantling.planning.outcome import Problem
from scantling.planning.result import Candidate
from scantling.planning.shapes import WIDTH_STEP, Shapes
from scantling.planning.variants import Array
from scantling.resolve import spec_from
from scantling.yamlio import dumps

RATIOS = (10.0, 20.0, 40.0)  # three tokens per parameter: the fewest that tell N from D
PARTS = (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1)  # of the best shape's width: the first that can be built
SIZES = 4
DATA = {"source": "python-stdlib", "tokenizer": "bytes"}
TRAIN = {"optimizer": {"kind": "adamw", "learning_rate": 3e-3}, "schedule": {"kind": "cosine", "warmup": 0.1}}
HEADER = (
    "# {why}\n# Its data are those of the plan's study section, else the standard library's sources as bytes: replace data and "
    "train by yours.\n# Then: scantling study THIS.yaml, scantling fit on its table, and law: of the next plan.\n"
)


def ladder(problem: Problem, best: Candidate, parts: Sequence[float] = PARTS) -> Shapes:
    """Smaller shapes like the best: its aspect ratio, head size, feed-forward ratio and, where they divide, its heads."""
    space, head_dim = problem.config.space, round(best.head_dim)
    follows = problem.law.heads is None and space.num_attention_heads is None
    kv = round(best.num_key_value_heads)
    step = WIDTH_STEP if not follows else head_dim * (kv if kv < best.num_attention_heads else 1)
    aspect = best.hidden_size / best.num_hidden_layers
    widths = np.unique([step * max(1, round(part * best.hidden_size / step)) for part in parts]).astype(np.int64)
    depths = np.rint(widths / aspect).astype(np.int64).clip(1)
    heads = widths // head_dim if follows else np.full_like(widths, round(best.num_attention_heads))
    kv_heads = heads if follows and kv >= best.num_attention_heads else np.gcd(heads, kv)
    variant = family_of(problem, best)
    inner, zero = space.variants[variant].ffn.inner(widths), np.zeros_like(widths)
    return Shapes(widths, depths, heads, kv_heads, np.full_like(widths, head_dim), inner, zero, zero + variant)


def family_of(problem: Problem, candidate: Candidate) -> int:
    """The place of a candidate's architecture among the variants: of its name and feed-forward ratio."""
    variants = problem.config.space.variants
    ratio = candidate.intermediate_size / candidate.hidden_size
    return min(
        range(len(variants)),
        key=lambda i: (variants[i].name != candidate.family, abs(variants[i].ffn.expansion - ratio)),
    )


def study_yaml(
    problem: Problem,
    name: str,
    why: str,
    shapes: Shapes,
    families: Mapping[str, dict[str, Any]],
    ratios: Sequence[float],
) -> str:
    """The study of these shapes, each at these tokens per parameter.

    Args:
        problem: the plan; its `study` section gives data, train and learning_rate.
        name: of the study.
        why: its first comment.
        shapes: the sizes.
        families: keys of each; empty for one family with the shapes' own.
        ratios: tokens per parameter.
    """
    config, given = problem.config, problem.config.study
    length = config.training.sequence_length
    sizes = []
    for i in range(len(shapes)):
        full = shapes.mapping(i, config.space, length)
        replaced = {key for keys in families.values() for key in keys}
        if any("width" in keys for keys in families.values()):
            replaced.add("head_dim")  # it follows each layer's width
        own = ("hidden_size", "num_hidden_layers", "head_dim", "ffn", "num_attention_heads", "num_key_value_heads")
        sizes.append({key: full[key] for key in own if key in full and key not in replaced})
    mapping = {
        "name": name,
        "model": {
            "vocab_size": config.space.vocab_size,
            "max_position_embeddings": length,
            "tie_word_embeddings": config.space.tie_word_embeddings,
        },
        "families": {name: dict(keys) for name, keys in families.items()} or {"plan": {}},
        "sizes": sizes,
        "tokens_per_parameter": [float(f"{ratio:.6g}") for ratio in ratios],
        "parameters": "total" if problem.law.count == "total" else "non_embedding",
        "data": dict(given.get("data", DATA)),
        "train": {"sequence_length": length, "batch_tokens": 8 * length, **given.get("train", TRAIN)},
    }
    if "learning_rate" in given:
        mapping["learning_rate"] = given["learning_rate"]
    return HEADER.format(why=why) + dumps(mapping)


def testing_study(problem: Problem, candidates: Sequence[Candidate]) -> str:
    """A study that would put the choice to the test: a ladder of the best shape, of each head configuration in question."""
    best = candidates[0]
    families: dict[str, dict[str, Any]] = {}
    if problem.law.heads is not None:
        for item in candidates:
            pair = (round(item.num_attention_heads), round(item.num_key_value_heads))
            families.setdefault(*head_family(pair))
    elif problem.config.space.families:
        baseline = [problem.evidence.baseline] if problem.evidence else []
        families = variant_families(problem, [*baseline, *(item.family for item in candidates)])
    ratios = RATIOS if problem.law.tokens_per_parameter is None else (problem.law.tokens_per_parameter,)
    why = "A ladder of the plan's best shape" + (", of the families in question" if families else "") + "."
    families = dict(list(families.items())[:4])
    sizes = ladder(problem, best)
    sizes = sizes.take(np.flatnonzero(buildable_as(problem, sizes, families))[:SIZES])
    return study_yaml(problem, "plan-ladder", why, sizes, families, ratios)


def head_family(pair: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """A head configuration as a family of a study: name and keys."""
    return f"h{pair[0]}-kv{pair[1]}", {"num_attention_heads": pair[0], "num_key_value_heads": pair[1]}


def buildable_as(problem: Problem, shapes: Shapes, names: Collection[str]) -> Array:
    """Which shapes can be built as every one of these families; all where none is a variant of the plan's."""
    keep = np.ones(len(shapes), dtype=bool)
    like = shapes.hidden_size
    for number, variant in enumerate(problem.config.space.variants):
        if variant.name not in names and len(problem.config.space.variants) > 1:
            continue
        inner = variant.ffn.inner(like)
        keep &= variant.buildable(like, shapes.num_hidden_layers, inner)
        changed = replace(shapes, intermediate_size=inner, variant=np.full_like(like, number))
        for index in np.flatnonzero(keep) if variant.profile is not None else ():
            try:
                spec_from(changed.mapping(int(index), problem.config.space, problem.config.training.sequence_length))
            except InputError:
                keep[index] = False
    return keep


def variant_families(problem: Problem, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The plan's own families as a study takes them, in this order."""
    by_name = {variant.name: variant for variant in reversed(problem.config.space.variants)}
    return {name: by_name[name].study_keys() for name in dict.fromkeys(names) if name in by_name}
