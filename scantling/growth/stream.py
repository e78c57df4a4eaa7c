"""Where the coordinates of the residual stream go when it grows, layer by layer.

With carry-forward every layer reads and writes the first coordinates of one wide stream. New coordinates can then be put in
after the first q of it: every layer at least q wide grows, narrower ones stay. Where learned maps change the width
(`compress`), every stretch between two maps is a stream of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scantling.growth.feedforward import kept_lanes
from scantling.growth.steps import Index, Inexact, appended, inserted
from scantling.parts import FFN, BlockDenseFFN, BlockShuffleFFN, CarryForward, Compress, MoEFFN, Zero
from scantling.spec import ModelSpec

Pair = tuple[int, int]


@dataclass(frozen=True)
class Stretch:
    """One coordinate system: what widths in it become.

    Attributes:
        places: of the widest, for every new coordinate the old one, -1 where new.
        widths: new width by old width.
    """

    places: Index
    widths: dict[int, int]

    def of(self, width: int) -> Index:
        """The map of the first `width` coordinates."""
        return self.places[: self.widths[width]]


@dataclass(frozen=True)
class Streams:
    """The coordinate systems along one stack.

    Attributes:
        stretches: by position: 0 the stack's input, then one per layer, then the unembedding.
        embedding: the map of the embedding table's own coordinates.
    """

    stretches: tuple[Stretch, ...]
    embedding: Index


def streams(spec: ModelSpec, target: ModelSpec, kept: Mapping[int | None, int]) -> Streams:
    """The maps from one spec's stream to another's, layers corresponding one to one.

    Args:
        kept: layers whose norm keeps its statistic on so many first coordinates; these may reach into coordinates that
            others use.

    Raises:
        Inexact: some width cannot become what the target says.
    """
    widths, wanted = spec.stream_widths, target.stream_widths
    segment = [0] * len(widths)
    for at in range(1, len(widths)):
        new = isinstance(spec.transition, Compress) and widths[at] != widths[at - 1]
        segment[at] = segment[at - 1] + new
    grows = widths != wanted
    if grows and len(set(widths)) > 1 and not isinstance(spec.transition, CarryForward | Zero | Compress):
        assert spec.transition is not None
        raise Inexact(
            f"transition {spec.transition.kind} maps coordinates between widths, which new ones would disturb; the width can "
            "grow exactly with carry_forward, zero or compress, or where all layers are equally wide"
        )
    if isinstance(spec.transition, Compress):
        for at, ((a, b), (c, d)) in enumerate(zip(pairwise(widths), pairwise(wanted), strict=True)):
            if (a == b) != (c == d):
                where = f"layers[{at}].hidden_size" if at < len(spec.stacks[0]) else "unembedding_size"
                raise Inexact(
                    f"{where}: {a} to {b} before it becomes {c} to {d}, but transition compress maps the stream wherever widths "
                    f"differ, so a map would come or go; expected {'equal' if a == b else 'different'} widths there"
                )
    found = []
    for each in range(segment[-1] + 1):
        positions = [at for at in range(len(widths)) if segment[at] == each]
        found.append(_stretch(spec, target, positions, kept))
    stretches = tuple(found[each] for each in segment)
    return Streams(stretches, _embedding(spec, target, stretches[0]))


def _embedding(spec: ModelSpec, target: ModelSpec, entry: Stretch) -> Index:
    branches = spec.branches
    if branches is not None and branches.entry == "projection":
        return appended(spec.embedding_size, target.embedding_size)
    inner = entry.of(spec.stream_widths[0])
    if branches is not None and branches.entry == "split":
        size = spec.embedding_size // branches.count
        return np.concatenate([np.where(inner < 0, -1, inner + size * branch) for branch in range(branches.count)])
    return inner


def _stretch(spec: ModelSpec, target: ModelSpec, positions: list[int], kept: Mapping[int | None, int]) -> Stretch:
    """One coordinate system from every pair of widths in it."""
    names: dict[Pair, str] = {}
    free: set[Pair] = set()  # pairs that may fall outside the rule
    bound: set[Pair] = set()  # pairs that may not
    last = len(spec.stream_widths) - 1
    blocks = 1
    shuffled = False
    for at in positions:
        pair = (spec.stream_widths[at], target.stream_widths[at])
        if at in (0, last):
            names.setdefault(pair, "embedding_size" if at == 0 else "unembedding_size")
            bound.add(pair)
            continue
        index = at - 1
        old, new = spec.stacks[0][index], target.stacks[0][index]
        names.setdefault(pair, f"layers[{index}].hidden_size")
        (free if index in kept else bound).add(pair)
        for key in ("attention_input_size", "ffn_output_size"):
            if (was := getattr(old, key)) is not None:
                names.setdefault((was, getattr(new, key) or new.hidden_size), f"layers[{index}].{key}")
        count, lanes = _blocks(old.ffn)
        blocks, shuffled = math.lcm(blocks, count), shuffled or lanes
    ruled = {pair: name for pair, name in names.items() if pair not in free - bound}
    for pair in sorted(
        free - bound
    ):  # kept layers follow the rule where they can, else they grow like the next narrower one
        if any(old == pair[0] for old, _ in ruled):
            continue
        try:
            _levels(ruled | {pair: names[pair]})
        except Inexact:
            narrow, grown_to = max((each for each in ruled if each[0] < pair[0]), default=(0, 0))
            ruled[(pair[0], pair[0] + grown_to - narrow)] = names[pair]
        else:
            ruled[pair] = names[pair]
    levels = _levels(ruled)
    places: list[int] = []
    before = grown = 0
    for width, wide in levels:
        places += [*range(before, width), *[-1] * (wide - width - grown)]
        before, grown = width, wide - width
    whole = np.array(places, dtype=np.int64)
    if blocks > 1 and grown:
        whole = _in_blocks(levels, blocks, shuffled)
    return Stretch(whole, dict(levels))


def _levels(pairs: dict[Pair, str]) -> list[Pair]:
    """Old and new widths in order.

    Raises:
        Inexact: equal widths grow differently, or a narrower one grows by more.
    """
    levels: dict[int, int] = {}
    for (old, new), name in sorted(pairs.items()):
        if new < old:
            raise Inexact(f"{name}: {old} to {new} would shrink; expected at least {old}")
        if levels.setdefault(old, new) != new:
            raise Inexact(
                f"{name}: {old} becomes {new} here and {levels[old]} elsewhere, but coordinates that layers share grow "
                f"together; expected {levels[old]}, or norm.statistic_size: {old} in the layers that differ, so that new "
                "coordinates of theirs leave their statistic alone"
            )
    ordered = sorted(levels.items())
    for (narrow, narrow_new), (wide, wide_new) in pairwise(ordered):
        if wide_new - wide < narrow_new - narrow:
            raise Inexact(
                f"a layer of width {narrow} would grow by {narrow_new - narrow}, into coordinates that layers of width {wide} "
                f"already use; expected all layers of at least {narrow} to grow by {narrow_new - narrow} "
                f"({wide} to {wide + narrow_new - narrow}), or norm.statistic_size: {narrow} in the narrow ones"
            )
    return ordered


def _blocks(ffn: FFN) -> tuple[int, bool]:
    """Blocks that divide a feed-forward's input, and whether they are shuffled."""
    if isinstance(ffn, MoEFFN):
        found = [_blocks(each) for each in (ffn.expert, ffn.shared_expert) if each is not None]
        return math.lcm(*[count for count, _ in found]), any(lanes for _, lanes in found)
    if isinstance(ffn, BlockShuffleFFN):
        return ffn.num_blocks, True
    return (ffn.num_blocks, False) if isinstance(ffn, BlockDenseFFN) else (1, False)


def _in_blocks(levels: list[Pair], blocks: int, shuffled: bool) -> Index:
    """The map of a stream whose layers read it in blocks: each block grows at its own end."""
    if len(levels) > 1:
        raise Inexact(
            f"layers of different widths with blocks in their feed-forwards ({blocks}) cannot grow together: block borders "
            "would move; expected equal widths, or feed-forwards without blocks"
        )
    ((old, new),) = levels
    if old % blocks or new % blocks:
        exact = new + -new % blocks
        raise Inexact(f"hidden_size {new}: expected a multiple of {blocks} blocks, such as {exact}")
    return kept_lanes(old, new, blocks) if shuffled else inserted(blocks, old // blocks, new // blocks)
