"""Devices and types by their names in the settings (layer 0)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.distributed import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(device: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else Apple's MPS, else the CPU; any other value is torch's own name.

    Of several processes that were launched together, each has a GPU of its own by `"auto"` or `"cuda"`.
    """
    own = world().device
    if own is not None and device in ("auto", own.type):
        return own
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise UserError(f"device {device!r} cannot be used here ({first_line(error)}). Set device to auto.") from error
    return chosen


def pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch type by its name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Compute with `n` CPU threads inside the block; 0 leaves torch's choice.

    The steps here take milliseconds. Threads that wait for one another at each of them gain little, and where another
    program uses the cores as well they made a run ten times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
