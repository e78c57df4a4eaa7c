"""Recorded outputs of the authors' code against ours: `python -m tests.parity DIR` runs every case found below DIR."""
