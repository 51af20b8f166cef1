"""Tensors in safetensors files: written atomically, and read only after the header was checked."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.files import CHECK, atomic_path, plain, require_file

MAX_HEADER = 2**26  # bytes of a safetensors header; names of 100,000 tensors take 10 MB


def write_tensors(
    path: Path | str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None, keep: Path | None = None
) -> None:
    """Write tensors to a safetensors file atomically.

    Args:
        path: the file.
        tensors: by name.
        about: a JSON-able object, the record of the file; it is stored in the header.
        keep: where to move the file that was there before.
    """
    header = {"about": json.dumps(about or {}, default=plain)}  # one entry: the order of several would be random
    with atomic_path(path, keep) as temporary:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, temporary, header)


def check_header(path: Path) -> None:
    """Raise a `ValueError` if the header of a safetensors file is longer than the file, or holds a name twice.

    The library safetensors checks that shapes, types and offsets agree and cover the file.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("its header names something twice")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(path.stat().st_size - 8, MAX_HEADER):
            raise ValueError(f"its header is said to have {length:,} bytes")
        json.loads(file.read(length).decode(), object_pairs_hook=once)


def read_tensors(path: Path | str, hint: str = CHECK) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and the record (`about`) of a safetensors file.

    Raises:
        UserError: the file is missing or damaged; the message ends with `hint`.
    """
    path = require_file(path, hint)
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if not isinstance(about, dict):
                raise ValueError("its record is no JSON object")
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 (not a dict)
    except (SafetensorError, ValueError, TypeError, AttributeError, OSError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({first_line(error)}). {hint}") from error


def is_real(tensor: Any) -> bool:
    """Whether this is a tensor of finite numbers in a floating-point type."""
    plain_types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return isinstance(tensor, Tensor) and tensor.dtype in plain_types and bool(tensor.isfinite().all())


def digest_of(*tensors: Tensor) -> str:
    """SHA-256 over the types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
