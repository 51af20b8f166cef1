"""How many CPU threads the scripts of this folder compute with."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
