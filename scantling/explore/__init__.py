"""A local page on which a plan's budget, context, served tokens, batch, device and law are moved and the answer follows.

`base` reads the plan that the page starts from, `state` is what the page changes in it, as the query of its URL; `controls`
are the sliders and lists, `answer` solves a state and words what the page shows, `page` is its HTML and `server` serves it.
"""

from scantling.explore.server import Explorer, serve

__all__ = ["Explorer", "serve"]
