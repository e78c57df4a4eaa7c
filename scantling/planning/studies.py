"""Studies that a plan asks for: a small ladder of its shapes, as the YAML that `scantling study` runs.

The ladder keeps the plan's aspect ratio, head size and feed-forward ratio and is much smaller; what `scantling fit` makes of
its table plugs into the next plan as `law:`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scantling.planning.outcome import Problem
from scantling.planning.result import Candidate
from scantling.planning.shapes import WIDTH_STEP, Shapes
from scantling.yamlio import dumps

RATIOS = (10.0, 20.0, 40.0)  # three tokens per parameter: the fewest that tell N from D
PARTS = (1 / 12, 1 / 8, 1 / 6, 1 / 4)  # of the best shape's width
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
    inner = (
        np.rint(space.ffn.expansion * widths / space.ffn.multiple_of).astype(np.int64).clip(1) * space.ffn.multiple_of
    )
    return Shapes(widths, depths, heads, kv_heads, np.full_like(widths, head_dim), inner, np.zeros_like(widths))


def study_yaml(
    problem: Problem, name: str, why: str, shapes: Shapes, heads: Mapping[str, tuple[int, int]], ratios: Sequence[float]
) -> str:
    """The study of these shapes, each at these tokens per parameter.

    Args:
        problem: the plan; its `study` section gives data, train and learning_rate.
        name: of the study.
        why: its first comment.
        shapes: the sizes.
        heads: (query heads, key/value heads) of each family; empty for one family with the shapes' own.
        ratios: tokens per parameter.
    """
    config, given = problem.config, problem.config.study
    length = config.training.sequence_length
    sizes = []
    for i in range(len(shapes)):
        full = shapes.mapping(i, config.space, length)
        keys = ("hidden_size", "num_hidden_layers", "head_dim", "ffn")
        own = () if heads else ("num_attention_heads", "num_key_value_heads")
        sizes.append({key: full[key] for key in (*keys, *own)})
    families: dict[str, Any] = {
        family: {"num_attention_heads": h, "num_key_value_heads": k} for family, (h, k) in heads.items()
    } or {"plan": {}}
    mapping = {
        "name": name,
        "model": {
            "vocab_size": config.space.vocab_size,
            "max_position_embeddings": length,
            "tie_word_embeddings": config.space.tie_word_embeddings,
        },
        "families": families,
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
    heads: dict[str, tuple[int, int]] = {}
    if problem.law.heads is not None:
        for item in candidates:
            pair = (round(item.num_attention_heads), round(item.num_key_value_heads))
            heads.setdefault(f"h{pair[0]}-kv{pair[1]}", pair)
    ratios = RATIOS if problem.law.tokens_per_parameter is None else (problem.law.tokens_per_parameter,)
    why = "A ladder of the plan's best shape" + (", of its head configurations" if heads else "") + "."
    return study_yaml(problem, "plan-ladder", why, ladder(problem, best), dict(list(heads.items())[:4]), ratios)
