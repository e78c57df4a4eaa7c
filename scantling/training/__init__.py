"""One run: RunConfig -> RunRecord. Interrupt it at any moment; the same command goes on, to the same weights bit for bit."""

from scantling.training.parallel import speaks
from scantling.training.run import profile, train

__all__ = ["profile", "speaks", "train"]
