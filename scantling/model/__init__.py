"""Torch modules built from a spec. Written for one device; nothing here knows of data or optimizers."""

from scantling.model.decoder import Decoder, build, build_meta
from scantling.model.layer import Cache

__all__ = ["Cache", "Decoder", "build", "build_meta"]
