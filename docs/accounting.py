"""Writes docs/bowtie-accounting.md: both accountings of the ><former's releases. Run: python docs/accounting.py"""

from pathlib import Path

from scantling import load_spec
from scantling.costing import Cost, cost, endpoint_waste

ROOT = Path(__file__).parent.parent
RELEASES = ("200m", "500m", "1b", "2b", "3b-moe")
HEAD = """# The ><former's releases, counted twice

The authors' accounting leaves out the *endpoint waste*: the first attention reads coordinates that no embedding fills, and
the last feed-forward writes coordinates that the head cuts off. The released model allocates and performs both. Against each
release's uniform baseline (arXiv 2606.18246), at a context of 4096, full attention; parameters here leave norm gains out on
both sides, as the authors do. Written by `python docs/accounting.py`.

| release | parameters, authors' | parameters, allocated | forward FLOPs/token, authors' | forward FLOPs/token, performed |
|---|---|---|---|---|
"""


def table() -> str:
    """The page."""
    lines = []
    for name in RELEASES:
        bowtie, uniform = (load_spec(ROOT / f"examples/specs/bowtie-{name}{kind}.yaml") for kind in ("", "-uniform"))
        found, base, waste = cost(bowtie, 4096), cost(uniform, 4096), endpoint_waste(bowtie)

        def weights(item: Cost) -> int:
            return sum(row.params for row in item.rows if row.component != "norm")

        params, flops = weights(found), found.flops_per_token["forward"]
        cells = [(params - waste["params"], weights(base)), (params, weights(base))]
        cells += [(flops - waste["flops"], base.flops_per_token["forward"]), (flops, base.flops_per_token["forward"])]
        shown = (f"{value:,} ({value / reference - 1:+.2%})" for value, reference in cells)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    (ROOT / "docs/bowtie-accounting.md").write_text(table(), encoding="utf-8")
