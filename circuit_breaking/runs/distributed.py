"""Processes that train one mask together, each on its share of every batch (layer 0).

`accelerate launch` starts them (or torchrun), and Hugging Face accelerate says which process this is and what device it
has. All draw the same batches and take the same decisions from sums over all processes, as if they were one. Where
nothing was launched there is one process, accelerate is not needed, and all that is here does nothing.
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
    """This process among all: its number, how many there are, and its device (None: the settings say)."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None


@cache
def world() -> World:
    """Where this process stands. The first call joins the others, where there are any.

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
    """Whether this process is the one that prints and writes files."""
    return world().rank == 0


def share(count: int, mirrored: bool = False) -> slice:
    """Which of `count` texts are this process's: consecutive ones, numbers of which differ by 1 at most.

    `mirrored` gives the first process what else is the last one's, so that two batches which do not divide evenly make
    for more even shares of both together.
    """
    here = world()
    rank = here.size - 1 - here.rank if mirrored else here.rank
    return slice(count * rank // here.size, count * (rank + 1) // here.size)


def sum_(tensor: Tensor) -> Tensor:
    """Set a tensor, of the same shape in all processes, to its sum over them, the same bits in each; returns it."""
    if world().size > 1:
        there = tensor.to(world().device)  # the only kind of device that the processes can talk over
        torch.distributed.all_reduce(there)
        tensor.copy_(there)
    return tensor


def largest(number: int) -> int:
    """The largest of the numbers of all processes; none goes on before all are here."""
    if world().size == 1:
        return number
    there = torch.tensor(number, device=world().device)
    torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
    return int(there)


def from_main(tensor: Tensor) -> Tensor:
    """The main process's tensor, of the same shape in all processes."""
    if world().size == 1:
        return tensor
    there = tensor.to(world().device, copy=True)
    torch.distributed.broadcast(there, 0)
    return there.to(tensor.device)


def same_random_states(device: torch.device) -> None:
    """Give all processes torch's random states of the main one: the CPU's, and that of the device in use."""
    if world().size == 1:
        return
    torch.set_rng_state(from_main(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(from_main(torch.cuda.get_rng_state(device)), device)
