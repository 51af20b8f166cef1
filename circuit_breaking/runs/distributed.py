"""Several processes that train one mask together, each on its share of every batch.

`accelerate launch` or torchrun starts them; the library accelerate tells each process its number and its device. All
processes draw the same batches and make the same decisions from sums over all of them, as one process would. Without a
launcher there is one process, accelerate is not needed, and the functions here do nothing.
"""

import atexit
import os
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.runs.launcher import launched


@dataclass(frozen=True)
class World:
    """The number of this process, how many there are, and its device (None: the settings choose)."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None


@cache
def world() -> World:
    """The place of this process among all. The first call connects it to the others, if there are any.

    Raises:
        UserError: several processes were launched and accelerate is not installed.
    """
    if launched()[1] == 1:
        return World()
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise UserError(
            "several processes were launched, which needs accelerate: pip install '.[cluster]'. "
            "Or start the script with python alone."
        ) from error
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    state = PartialState(cpu=cpu or not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)
    return World(state.process_index, state.num_processes, state.device)


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return world().rank == 0


def share(count: int, mirrored: bool = False) -> slice:
    """The texts of a batch of `count` that this process computes: consecutive ones. Shares differ by at most 1 text.

    `mirrored` gives the first process the share of the last one and so on, so that the shares of two batches that do
    not divide evenly are more even together.
    """
    here = world()
    rank = here.size - 1 - here.rank if mirrored else here.rank
    return slice(count * rank // here.size, count * (rank + 1) // here.size)


def sum_(tensor: Tensor) -> Tensor:
    """Set a tensor, of the same shape in all processes, to its sum over them, the same bits in each; returns it."""
    if world().size > 1:
        there = tensor.to(world().device)  # the processes communicate on devices of this kind only
        torch.distributed.all_reduce(there)
        tensor.copy_(there)
    return tensor


def largest(number: int) -> int:
    """The largest of the numbers of all processes; it also waits until all processes have called it."""
    if world().size == 1:
        return number
    there = torch.tensor(number, device=world().device)
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
    return int(there)


def from_main(tensor: Tensor) -> Tensor:
    """The tensor of the main process; it has the same shape in all processes."""
    if world().size == 1:
        return tensor
    there = tensor.to(world().device, copy=True)
    torch.distributed.broadcast(there, 0)
    return there.to(tensor.device)


def same_random_states(device: torch.device) -> None:
    """Set the random states of torch in all processes to those of the main one: the CPU's and the device's."""
    if world().size == 1:
        return
    torch.set_rng_state(from_main(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(from_main(torch.cuda.get_rng_state(device)), device)
