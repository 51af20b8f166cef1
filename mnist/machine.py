"""Where the scripts of this folder compute: the device, and how many CPU threads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from circuit_breaking.cli import UserError


def pick_device(device: str) -> torch.device:
    """`"auto"` is CUDA where there is one, else Apple's MPS, else the CPU; any other value is torch's own name."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used on this machine. Set it to auto or cpu.") from error
    return chosen


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
