"""IDX files, the format of MNIST and of the data sets made in its likeness (Fashion-MNIST, KMNIST, EMNIST).

Format (http://yann.lecun.com/exdb/mnist/): two zero bytes, one byte for the type (8: unsigned byte), one for the
number of dimensions, then each dimension as a big-endian 32-bit integer, then the values, row by row. Nothing here
believes a header: a size is checked against the file before memory is set aside for it.
"""

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import require_file

GZIP_MAGIC = b"\x1f\x8b"
GZIP_MAX_RATIO = 1032  # DEFLATE cannot pack tighter
MAX_BYTES = 2**30  # about 1.4 million images of 28 x 28
CHUNK = 2**20
KINDS = {1: "labels", 3: "images"}
ADVICE = "Get the file again, or point --data at another folder."


def read_idx(path: Path, n_dims: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzip-compressed or not (told by content, not by name).

    `n_dims` is 3 for images [N, rows, columns] and 1 for labels [N]. Anything wrong with the file is a `UserError`.
    """
    require_file(path, ADVICE)
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == GZIP_MAGIC
            raw.seek(0)
            size = path.stat().st_size
            if packed:
                with gzip.GzipFile(fileobj=raw) as file:
                    return _read(file, path, n_dims, at_most=size * GZIP_MAX_RATIO)
            if path.suffix == ".gz":
                raise UserError(f"{path} is named .gz but is not gzip-compressed. {ADVICE}")
            return _read(raw, path, n_dims, at_most=size)
    except EOFError as error:
        raise UserError(f"{path} is cut short inside its gzip data. {ADVICE}") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} has damaged gzip data ({error}). {ADVICE}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}. Check --data.") from error


def _read(file: BinaryIO, path: Path, n_dims: int, at_most: int) -> np.ndarray:
    """Header, checks, values. `at_most`: bytes that the file can possibly hold."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise UserError(f"{path} is not an IDX file: it starts with {magic.hex() or 'nothing'}, not 0000. {ADVICE}")
    if magic[2] != 8:
        raise UserError(f"{path} holds IDX type 0x{magic[2]:02x}; only unsigned bytes (0x08) are read here. {ADVICE}")
    if magic[3] != n_dims:
        found = KINDS.get(magic[3], f"{magic[3]}-dimensional data")
        raise UserError(f"{path} should hold {KINDS[n_dims]} but holds {found}: are two files swapped? {ADVICE}")
    header = file.read(4 * n_dims)
    if len(header) < 4 * n_dims:
        raise UserError(f"{path} ends inside its header. {ADVICE}")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    promised = math.prod(shape)  # Python integers: no overflow
    described = " x ".join(map(str, shape))
    if promised == 0:
        raise UserError(f"{path} is empty: its header says {described}. {ADVICE}")
    if promised > MAX_BYTES:
        raise UserError(f"{path} claims {described} values, more than the {MAX_BYTES:,} that are read here. {ADVICE}")
    start = 4 + 4 * n_dims
    if start + promised > at_most:
        raise UserError(f"{path} is truncated: its header says {described} values, more than the file holds. {ADVICE}")
    values = bytearray()
    while len(values) <= promised and (part := file.read(min(CHUNK, promised + 1 - len(values)))):
        values += part
    if len(values) < promised:
        raise UserError(f"{path} is truncated: {len(values):,} of {promised:,} values ({described}). {ADVICE}")
    if len(values) > promised:
        raise UserError(f"{path} is longer than the {described} values of its header. {ADVICE}")
    return np.frombuffer(values, np.uint8).reshape(shape)
