"""Checkpoints of a run that may be killed at any moment, and the signals that announce it (layer 1).

A checkpoint is one safetensors file: the run's tensors, its numbers as JSON, and the random states of torch. It is
written beside the last one and renamed, so that a whole one is there at every moment; the one before is kept, and each
carries a SHA-256 over all that it holds, so that a damaged one is known and passed over.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.runs.distributed import is_main, largest
from circuit_breaking.runs.files import plain
from circuit_breaking.runs.signals import Stopped
from circuit_breaking.runs.tensors import read_tensors, write_tensors

NEWEST, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


@dataclass
class Saved:
    """What a checkpoint holds: steps done, tensors by name, and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class Checkpoints:
    """The last two checkpoints of the run in `folder`.

    Attributes:
        folder: the run folder.
        run: JSON-able description of the run (settings, input hashes); only a checkpoint of the same run is resumed.
        every: steps between checkpoints; 0 saves only at the end and when told to stop.
    """

    folder: Path
    run: dict[str, Any]
    every: int = 50
    _before: float = field(default=0.0, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def seconds(self) -> float:
        """Time since this was made, or since `load`, with what had passed before the checkpoint loaded."""
        return self._before + time.perf_counter() - self._since

    def after(
        self,
        step: int,
        state: Callable[[], dict[str, Tensor]],
        values: dict[str, Any],
        signals: Sequence[int],
        last: bool = False,
    ) -> None:
        """What a training loop does between steps: save where it is time to, and end where it was told to stop.

        Of several processes that train together the main one saves, and all end where one was told to.

        Args:
            step: steps done.
            state: gives the tensors that the next steps depend on.
            values: what else they depend on, JSON-able.
            signals: what `stop_signals` gave.
            last: whether there are no more steps; the end is saved too, so that it is not trained again.

        Raises:
            Stopped: a signal had arrived; the state is saved.
        """
        told = largest(signals[0] if signals else 0)
        if is_main() and (told or last or (self.every and step % self.every == 0)):
            self.save(step, state(), values)
        if told:
            largest(0)  # the first process to leave may take the others with it: not before all is saved
            raise Stopped(f"told to stop by signal {told} after step {step}; run it again to go on.")

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write the state after `step` steps, with torch's random states, and keep the one before."""
        tensors = {**tensors, **{f"random.{name}": state for name, state in random_states().items()}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {"run": self.run, "step": step, "values": {"seconds": self.seconds(), **values}}
        about = json.loads(json.dumps(about, default=plain))  # what will be read is what is hashed
        record = {**about, "sha256": _digest(tensors, about)}
        write_tensors(self.folder / NEWEST, tensors, record, keep=self.folder / PREVIOUS)

    def load(self) -> Saved | None:
        """The newest whole checkpoint of this run, None if there is none; says on stderr what it passes over.

        torch's random states are set to the saved ones.
        """
        for path in (self.folder / NEWEST, self.folder / PREVIOUS):
            if not path.is_file():
                continue
            try:
                tensors, about = read_tensors(path)
                digest = about.pop("sha256", None)
                if digest != _digest(tensors, about):
                    raise UserError(f"{path} is damaged: its checksum does not match")
                if type(about.get("step")) is not int or not isinstance(about.get("values"), dict):
                    raise UserError(f"{path} is no checkpoint")
                states = part_of(tensors, "random")
                _check_states(path, states)
            except UserError as error:
                print(f"passed over a checkpoint: {error}", file=sys.stderr)
                continue
            if about.get("run") != json.loads(json.dumps(self.run, default=plain)):
                print(f"{path} is of a run with other settings or data: starting anew.", file=sys.stderr)
                return None
            set_random_states(states)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
            self._before, self._since = about["values"].get("seconds", 0.0), time.perf_counter()
            return Saved(about["step"], tensors, about["values"])
        return None

    def hand_on(self, other: "Checkpoints") -> None:
        """Let another run go on from where this one is."""
        saved = self.load()
        other.save(saved.step, saved.tensors, saved.values)

    def remove(self) -> None:
        """Delete both, once the run's results are written."""
        for name in (NEWEST, PREVIOUS):
            (self.folder / name).unlink(missing_ok=True)


def random_states() -> dict[str, Tensor]:
    """torch's random states: the CPU's, and each CUDA device's once CUDA is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set what `random_states` gave; states of devices that are not here are left out."""
    for name, state in states.items():
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available() and int(name.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name.removeprefix("cuda")))


def _check_states(path: Path, states: dict[str, Tensor]) -> None:
    cpu = torch.get_rng_state()
    for name, state in states.items():
        known = name == "cpu" or (name.startswith("cuda") and name[4:].isdecimal())
        if not known or state.dtype != cpu.dtype or (name == "cpu" and state.shape != cpu.shape):
            raise UserError(f"{path} holds a random state that is none: {name}")


def optimizer_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer of one parameter keeps of it (Adam: two moments and the number of steps)."""
    return dict(optimizer.state.get(parameter, {}))


def restore_optimizer(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]) -> None:
    """Go on from what `optimizer_state` gave; the number of steps stays on the CPU, as torch has it."""
    if state:
        optimizer.state[parameter] = {
            name: value if name == "step" else value.to(parameter) for name, value in state.items()
        }


def training_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, and what their optimizer keeps of each."""
    tensors = {f"parameters.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        kept = optimizer_state(optimizer, parameter)
        tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items()}
    return tensors


@torch.no_grad()
def restore_training(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Go on from what `training_state` gave."""
    kept: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for full, tensor in tensors.items():
        if full.startswith("optimizer."):
            _, key, name = full.split(".", 2)
            kept[name][key] = tensor
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameters.{name}"])
        restore_optimizer(optimizer, parameter, kept[name])


def state_of(**parts: Any) -> dict[str, Tensor]:
    """The states of all that has a `state()`, each tensor named after its part."""
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state().items()}


def part_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part of `state_of`."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def restore_parts(tensors: Mapping[str, Tensor], parts: Mapping[str, Any], *where: torch.device) -> None:
    """Give each part back what `state_of(**parts)` took from it; on a device, for parts that need to know it."""
    for name, part in parts.items():
        part.restore(part_of(tensors, name), *where)


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
