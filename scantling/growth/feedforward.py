"""Growing feed-forward layers: inner width, rank, structure, experts (arXiv 2308.06103, 3.1; structured maps derived).

New inner units are made by random rows and read through zeros, so their output starts at nothing and learns at once.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from scantling.growth.axes import Dim
from scantling.growth.steps import Change, Computed, Index, Inexact, Source, Step, appended, inserted, twins, with_layer
from scantling.parts import FFN, BlockDenseFFN, BlockShuffleFFN, DenseFFN, ExpertFFN, LowRankFFN, MoEFFN
from scantling.spec import LayerSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = ""


def kept_lanes(old: int, new: int, blocks: int) -> Index:
    """A map that keeps every coordinate's block (i // (size / blocks)) and lane (i mod blocks), as block shuffles need.

    Raises:
        Inexact: a block has too few places in some lane.
    """
    index = np.full(new, -1)
    was, now = old // blocks, new // blocks
    for block in range(blocks):
        for lane in range(blocks):
            sources = [i for i in range(block * was, (block + 1) * was) if i % blocks == lane]
            places = [i for i in range(block * now, (block + 1) * now) if i % blocks == lane]
            if len(places) < len(sources):
                step = blocks * blocks
                exact = old + math.ceil((new - old) / step) * step
                raise Inexact(
                    f"{blocks} shuffled blocks have no place for every unit at {new}: expected a size such as {exact}"
                )
            index[places[: len(sources)]] = sources
    return index


def structured(size_old: int, size_new: int, ffn: ExpertFFN) -> Index:
    """Where inner coordinates of a feed-forward go."""
    match ffn:
        case BlockDenseFFN(num_blocks=blocks):
            return inserted(blocks, size_old // blocks, size_new // blocks)
        case BlockShuffleFFN(num_blocks=blocks):
            return kept_lanes(size_old, size_new, blocks)
    return appended(size_old, size_new)


def parts_of(ffn: FFN, part: str) -> list[str]:
    """The prefixes of a part's parameters: every expert of `expert`."""
    if part == "expert":
        assert isinstance(ffn, MoEFFN)
        return [f"experts.{index}." for index in range(ffn.num_local_experts)]
    return ["shared_expert."] if part == "shared_expert" else [PLAIN]


def inside(ffn: FFN, part: str) -> ExpertFFN:
    """The feed-forward that a part names: itself, `expert` or `shared_expert`."""
    found = getattr(ffn, part) if part else ffn
    assert not isinstance(found, MoEFFN) and found is not None
    return found


def common_parts(ffn: FFN, goal: FFN) -> list[str]:
    """Parts of a feed-forward that two feed-forwards both have."""
    if isinstance(ffn, MoEFFN) and isinstance(goal, MoEFFN):
        return ["expert", *["shared_expert"] * (ffn.shared_expert is not None and goal.shared_expert is not None)]
    return [] if isinstance(goal, MoEFFN) or isinstance(ffn, MoEFFN) else [PLAIN]


def with_ffn(spec: ModelSpec, index: int, part: str, new: FFN) -> ModelSpec:
    """The spec with one layer's feed-forward, or a part of it, replaced."""
    ffn = spec.layers[index].ffn
    return with_layer(spec, index, ffn=ffn.replace(**{part: new}) if part else new)


def linears(ffn: ExpertFFN) -> list[str]:
    """Names of the linears of one feed-forward."""
    into = ["up_proj"] if not ffn.gated else ["gate_proj", "up_proj"] if isinstance(ffn, DenseFFN) else ["gate_up_proj"]
    return [*into, "down_proj"]


def between(layer: LayerSpec, ffn: ExpertFFN) -> dict[str, int]:
    """Size between the factors of every structured linear."""
    if isinstance(ffn, LowRankFFN | BlockDenseFFN):
        return {name: ffn.rank for name in linears(ffn)}
    if isinstance(ffn, BlockShuffleFFN):
        inner, written = ffn.intermediate_size, layer.ffn_output_size or layer.hidden_size
        *into, down = linears(ffn)
        made = inner * (2 if ffn.gated else 1)
        return {into[0]: min(layer.hidden_size, made), down: min(inner, written)}
    return {}


def rank_changes(spec: ModelSpec, after: ModelSpec, index: int) -> dict[Dim, Change]:
    """Growth between the factors, from one spec to another: random rows before it, zero columns behind it."""
    changes: dict[Dim, Change] = {}
    old_ffn, new_ffn = spec.layers[index].ffn, after.layers[index].ffn
    for part in ("expert", "shared_expert") if isinstance(old_ffn, MoEFFN) else (PLAIN,):
        if part == "shared_expert" and old_ffn.shared_expert is None:  # type: ignore[union-attr]
            continue
        old, new = inside(old_ffn, part), inside(new_ffn, part)
        sizes = between(after.layers[index], new)
        for name, size in between(spec.layers[index], old).items():
            if sizes[name] == size:
                continue
            places = structured(size, sizes[name], old)
            for at in twins(spec, index):
                for prefix in parts_of(old_ffn, part):
                    changes[Dim("rank_made", at, prefix + name)] = Change(places, "free")
                    changes[Dim("rank_used", at, prefix + name)] = Change(places, "zero")
    return changes


def grow_inner(spec: ModelSpec, index: int, size: int, part: str = PLAIN) -> Step:
    """A wider feed-forward (3.1): new rows of gate and up are free, what reads them in down is zero."""
    whole = spec.layers[index].ffn
    ffn = inside(whole, part)
    after = with_ffn(spec, index, part, ffn.replace(intermediate_size=size))
    places = structured(ffn.intermediate_size, size, ffn)
    pair = np.concatenate([places, np.where(places < 0, -1, places + ffn.intermediate_size)])
    changes = rank_changes(spec, after, index)
    for at in twins(spec, index):
        for prefix in parts_of(whole, part):
            changes[Dim("inner", at, prefix)] = Change(places, "free")
            changes[Dim("inner_pair", at, prefix)] = Change(pair, "free")
            changes[Dim("inner_used", at, prefix)] = Change(places, "zero")
    text = f"layer {index}: {part + ' ' if part else ''}intermediate_size {ffn.intermediate_size} to {size}"
    return Step("mlp", text, spec, after, changes)


def grow_rank(spec: ModelSpec, index: int, rank: int, part: str = PLAIN) -> Step:
    """A larger rank of low-rank or block-dense maps."""
    ffn = inside(spec.layers[index].ffn, part)
    assert isinstance(ffn, LowRankFFN | BlockDenseFFN)
    after = with_ffn(spec, index, part, ffn.replace(rank=rank))
    text = f"layer {index}: {part + ' ' if part else ''}rank {ffn.rank} to {rank}"
    return Step("rank", text, spec, after, rank_changes(spec, after, index))


def merge_blocks(spec: ModelSpec, index: int, blocks: int, part: str = PLAIN) -> Step:
    """Fewer, larger blocks of block-dense maps: neighbours become one block-diagonal block, whose zeros are trainable."""
    ffn = inside(spec.layers[index].ffn, part)
    assert isinstance(ffn, BlockDenseFFN)
    if ffn.num_blocks % blocks:
        raise Inexact(
            f"layers[{index}].ffn: {ffn.num_blocks} blocks merge into a divisor of {ffn.num_blocks}, got {blocks}"
        )
    together = ffn.num_blocks // blocks
    after = with_ffn(spec, index, part, ffn.replace(num_blocks=blocks))
    sources: dict[str, Source] = {}
    for name in _structured_names(spec, index, part):
        sources[f"{name}.down.weight"] = Computed(
            (f"{name}.down.weight",), lambda given: _merged(given[0], together), True
        )
    text = f"layer {index}: {part + ' ' if part else ''}num_blocks {ffn.num_blocks} to {blocks}"
    return Step("merge blocks", text, spec, after, sources=sources)


def _merged(blocks: "Tensor", together: int) -> "Tensor":
    count, out, into = blocks.shape
    merged = blocks.new_zeros(count // together, together, out, together, into)
    for at in range(together):
        merged[:, at, :, at] = blocks[at::together]
    return merged.reshape(count // together, together * out, together * into)


def materialise(spec: ModelSpec, index: int, target: ExpertFFN, part: str = PLAIN) -> Step:
    """A structured feed-forward as the dense one it is, or a block-dense one as the low-rank one it is.

    Raises:
        Inexact: the target is no dense or low-rank form of the same feed-forward.
    """
    whole = spec.layers[index].ffn
    ffn = inside(whole, part)
    after = with_ffn(spec, index, part, target)
    sources: dict[str, Source] = {}
    for name in _structured_names(spec, index, part):
        if isinstance(target, LowRankFFN):
            sources[f"{name}.down.weight"] = Computed((f"{name}.down.weight",), _block_diagonal, True)
            continue
        factors = (f"{name}.down.weight", f"{name}.up.weight")
        bias = f"{name}.bias" if isinstance(ffn, BlockShuffleFFN) else f"{name}.up.bias"
        halves = [(name, 0, 1)]
        if name.endswith("gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            halves = [(f"{stem}gate_proj", 0, 2), (f"{stem}up_proj", 1, 2)]
        for made, half, of in halves:
            sources[f"{made}.weight"] = Computed(factors, _product(ffn, half, of))
            if ffn.bias:
                sources[f"{made}.bias"] = Computed((bias,), _half(half, of), True)
    text = f"layer {index}: {part + ' ' if part else ''}{ffn.kind} to {target.kind}"
    return Step("structure", text, spec, after, sources=sources)


def _half(half: int, of: int) -> "Callable[[Sequence[Tensor]], Tensor]":
    return lambda given: given[0].chunk(of)[half]


def _block_diagonal(given: "Sequence[Tensor]") -> "Tensor":
    import torch

    dense: Tensor = torch.block_diag(*given[0])  # type: ignore[no-untyped-call]
    return dense


def _product(ffn: ExpertFFN, half: int, of: int) -> "Callable[[Sequence[Tensor]], Tensor]":
    """The dense matrix of two factors, or one half of its rows, multiplied in float64."""

    def product(given: "Sequence[Tensor]") -> "Tensor":
        import torch

        from scantling.model.ffn import BlockShuffleLinear

        down, up = (factor.double() for factor in given)
        match ffn:
            case LowRankFFN():
                dense = up @ down
            case BlockDenseFFN():
                dense = up @ torch.block_diag(*down)  # type: ignore[no-untyped-call]
            case _:
                with torch.device("meta"):
                    linear = BlockShuffleLinear(
                        down.shape[0] * down.shape[2], up.shape[0] * up.shape[1], down.shape[0], False
                    )
                linear.down.weight, linear.up.weight = torch.nn.Parameter(down), torch.nn.Parameter(up)
                dense = linear.merge().detach()
        return dense.chunk(of)[half].to(given[0].dtype)

    return product


def _structured_names(spec: ModelSpec, index: int, part: str) -> list[str]:
    """The structured linears of a part, by full name, in every branch."""
    whole = spec.layers[index].ffn
    ffn = inside(whole, part)
    return [
        f"layers.{at}.mlp.{prefix}{name}"
        for at in twins(spec, index)
        for prefix in parts_of(whole, part)
        for name in linears(ffn)
    ]
