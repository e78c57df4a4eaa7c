"""Growth: enlarge any dimension of any model, same function, with a receipt (arXiv 2308.06103 and what followed).

`path` plans the expansions between two specs, `grow` applies them to a model, `grow_folder` to a checkpoint on disk.
"""

from scantling.growth.folders import grow, grow_folder, grown_state
from scantling.growth.path import path
from scantling.growth.receipt import Receipt
from scantling.lineage import Policy

__all__ = ["Policy", "Receipt", "grow", "grow_folder", "grown_state", "path"]
