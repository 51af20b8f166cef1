"""Devices and number types by their names in the settings."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.distributed import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device(device: str) -> torch.device:
    """The torch device of a name: `"auto"` is CUDA if there is one, else Apple's MPS, else the CPU.

    With several processes, `"auto"` and `"cuda"` give each process another GPU.

    Raises:
        UserError: the device cannot be used here.
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
    """The torch type of a name. Raises `UserError` for an unknown name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def without_autocast(device: torch.device) -> torch.autocast:
    """Within the block, `torch.autocast` is off for a device: products are computed in the type of their tensors."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)


@contextmanager
def cpu_threads(n: int) -> Iterator[None]:
    """Compute with `n` CPU threads while the block lasts; 0 leaves the choice to torch.

    On small models a step takes milliseconds. Threads that wait for each other at every step gain little, and made a
    run ten times slower on a machine whose cores another program used too.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
