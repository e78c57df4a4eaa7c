"""Weights on disk, one tensor at a time: safetensors files read and written without holding a model in memory.

A `Tensors` knows names, shapes and dtypes, and makes a tensor when asked. Files are one; a renamed, transposed or grown view
of another is one too, so a conversion is `write_tensors(folder, view_of(open_tensors(path)))`.
"""

from scantling.tensor_files.reading import open_tensors
from scantling.tensor_files.tensors import Held, Produced, Rows, Shape, Tensors, row_blocks, rows_of
from scantling.tensor_files.writing import (
    CHECKSUMS,
    Written,
    check_files,
    digest,
    needed,
    new_folder,
    verify,
    write_shards,
    write_tensors,
)

__all__ = [
    "CHECKSUMS",
    "Held",
    "Produced",
    "Rows",
    "Shape",
    "Tensors",
    "Written",
    "check_files",
    "digest",
    "needed",
    "new_folder",
    "open_tensors",
    "row_blocks",
    "rows_of",
    "verify",
    "write_shards",
    "write_tensors",
]
