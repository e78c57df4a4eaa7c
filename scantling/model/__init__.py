"""Torch modules built from a spec. Written for one device; nothing here knows of data, optimizers or files."""

from scantling.model.decoder import Cache, Decoder, build, build_meta

__all__ = ["Cache", "Decoder", "build", "build_meta"]
