"""The command line: thin verbs over the library. Exit 0 done; 2 the input is wrong; 1 it failed while running.

Each verb imports what it needs when it runs, so that sizing, predicting and planning never load torch.
"""

from scantling.cli import (  # noqa: F401  a file of verbs adds them to the app when it is imported
    exploring,
    growing,
    hugging_face,
    laws,
    planning,
    reporting,
    specs,
    timing,
    training,
)
from scantling.cli.app import app, main

__all__ = ["app", "main"]
