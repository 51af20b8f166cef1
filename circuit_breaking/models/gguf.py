"""Whether a GGUF file can hold what its header says, before a library reads it.

Format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: `GGUF`, version, number of tensors,
number of fields; each field's name, type and value; each tensor's name, dimensions, type and offset; then, aligned, the
tensors. The gguf library trusts the header: it would loop over an array far beyond the end of the file.
"""

import math
import mmap
import struct
from pathlib import Path

from circuit_breaking.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SIZES = (1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)  # bytes of a value by the number of its type
STRING, ARRAY = 8, 9
MOST_DIMS = 4
MOST_NESTED = 4  # arrays in arrays
HINT = "Get the file again."


class _Walk:
    """Reads a file from front to back. Raises `ValueError` if the file ends too early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"it ends where {count:,} more bytes should be")
        self.at += count

    def number(self, form: str) -> int:
        start = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def string(self) -> bytes:
        length = self.number("<Q")
        self.skip(length)
        return self.data[self.at - length : self.at] if length < 64 else b""

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.string()
        elif kind == ARRAY and depth < MOST_NESTED:
            inner, count = self.number("<I"), self.number("<Q")
            if inner < len(SIZES) and SIZES[inner]:
                self.skip(count * SIZES[inner])
                return
            # each string or array takes at least 8 bytes, so this bounds the loop
            if count * 8 > len(self.data) - self.at:
                raise ValueError(f"it has no room for an array of {count:,}")
            for _ in range(count):
                self.value(inner, depth + 1)
        elif kind < len(SIZES) and SIZES[kind]:
            self.skip(SIZES[kind])
        else:
            raise ValueError(f"it holds a value of the unknown type {kind}")

    def tensor(self) -> tuple[int, int, int]:
        """Number of elements, type and offset of the tensor described at this point."""
        self.string()
        dims = self.number("<I")
        if dims > MOST_DIMS:
            raise ValueError(f"it has a tensor of {dims:,} dimensions")
        shape = [self.number("<Q") for _ in range(dims)]
        return math.prod(shape), self.number("<I"), self.number("<Q")


def check_gguf(path: Path) -> None:
    """Raise a `UserError` for a GGUF file that is damaged or shorter than its header says.

    Raises `ImportError` without the package gguf, which the extra `gguf` installs.
    """
    from gguf import GGML_QUANT_SIZES  # an optional dependency

    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError("it does not start with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                walk = _Walk(data)
                walk.skip(4)
                if (version := walk.number("<I")) not in VERSIONS:
                    raise ValueError(f"it is of version {version:,}; 2 and 3 are read")
                tensors, fields = walk.number("<Q"), walk.number("<Q")
                aligned = 32
                for _ in range(fields):
                    name = walk.string()
                    walk.value(walk.number("<I"))
                    if name == b"general.alignment":
                        aligned = max(1, struct.unpack_from("<I", data, walk.at - 4)[0])
                described = [walk.tensor() for _ in range(tensors)]
                room = len(data) - -(-walk.at // aligned) * aligned
                for elements, kind, offset in described:
                    if kind not in GGML_QUANT_SIZES:
                        raise ValueError(f"it holds a tensor of the unknown type {kind:,}")
                    block, size = GGML_QUANT_SIZES[kind]
                    if offset + elements * size // block > room:
                        raise ValueError(f"it ends before a tensor of {elements:,} values")
    except (ValueError, struct.error) as error:
        raise UserError(f"{path} is not a readable GGUF file: {error}. {HINT}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. {HINT}") from error
