"""`python -m scantling`: the same command line."""

from scantling.cli import main

main()
