"""Checkpoints of a run that may be killed at any moment.

A checkpoint is one safetensors file: the tensors of the run, its other values as JSON, and the random states of torch.
It is written to a temporary file that is then renamed, so a complete checkpoint exists at every moment. The previous
one stays as well. A SHA-256 over the whole content shows whether a checkpoint is damaged; a damaged one is skipped.
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
from circuit_breaking.runs.code import difference, hashes_of
from circuit_breaking.runs.distributed import is_main, largest
from circuit_breaking.runs.files import plain
from circuit_breaking.runs.signals import Stopped, note_saved
from circuit_breaking.runs.tensors import read_tensors, write_tensors

NEWEST, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"
CODE = {"code", "git_commit"}  # entries of a run that say with which code it runs; the release before had the commit


@dataclass
class Saved:
    """The content of a checkpoint: number of steps done, tensors by name, and JSON-able values."""

    step: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass
class Checkpoints:
    """The last two checkpoints of the run in `folder`.

    Attributes:
        folder: the run folder.
        run: JSON-able description of the run (settings, hashes of inputs and code). Only checkpoints of the same run
            are loaded.
        every: steps between checkpoints; 0 saves only at the end and when a signal arrives.
    """

    folder: Path
    run: dict[str, Any]
    every: int = 50
    _before: float = field(default=0.0, init=False)
    _since: float = field(default_factory=time.perf_counter, init=False)

    def seconds(self) -> float:
        """Training time so far, with the time before the checkpoint that was loaded."""
        return self._before + time.perf_counter() - self._since

    def after(
        self,
        step: int,
        state: Callable[[], dict[str, Tensor]],
        values: dict[str, Any],
        signals: Sequence[int],
        last: bool = False,
    ) -> None:
        """Save a checkpoint if one is due, and stop if a signal has arrived. Training loops call this between steps.

        Of several processes that train together the main one saves, and all stop if one of them received a signal.

        Args:
            step: number of steps done.
            state: gives the tensors that the next steps depend on.
            values: other values that they depend on, JSON-able.
            signals: the list that `stop_signals` gives.
            last: whether this was the last step. The end is saved too, so that it need not be trained again.

        Raises:
            Stopped: a signal had arrived; the state is saved.
        """
        received = largest(signals[0] if signals else 0)
        if is_main() and (received or last or (self.every and step % self.every == 0)):
            self.save(step, state(), values)
        if received:
            largest(0)  # the first process that ends may end the others too, so all wait until the state is saved
            raise Stopped(f"stopped by signal {received} after step {step}; run the same command again to continue.")

    def save(self, step: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Write the state after `step` steps and torch's random states. The previous checkpoint stays."""
        tensors = {**tensors, **{f"random.{name}": state for name, state in random_states().items()}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        about = {"run": self.run, "step": step, "values": {"seconds": self.seconds(), **values}}
        about["source_files"] = hashes_of(self.run.get("code"))
        about = json.loads(json.dumps(about, default=plain))  # the hash is of the values as they will be read
        record = {**about, "sha256": _digest(tensors, about)}
        write_tensors(self.folder / NEWEST, tensors, record, keep=self.folder / PREVIOUS)
        note_saved()

    def load(self) -> Saved | None:
        """Load the newest undamaged checkpoint of this run and set torch's random states to the saved ones.

        Returns None if there is no checkpoint, or one of other settings, data or code: the run then starts from the
        beginning. stderr names the files that were skipped, and why.
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
            if (why := self._why_other(about)) is not None:
                print(f"{path} is of a run with {why}", file=sys.stderr)
                return None
            set_random_states(states)
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}
            self._before, self._since = about["values"].get("seconds", 0.0), time.perf_counter()
            return Saved(about["step"], tensors, about["values"])
        return None

    def _why_other(self, about: Mapping[str, Any]) -> str | None:
        """The end of the sentence that says why a checkpoint is not of this run; None if it is."""
        here, there = json.loads(json.dumps(self.run, default=plain)), about.get("run")
        if here == there:
            return None
        if not isinstance(there, dict) or any(here.get(key) != there.get(key) for key in {*here, *there} - CODE):
            return "other settings or data: starting from the beginning."
        files = about.get("source_files")
        what = difference(files if isinstance(files, dict) else {}, hashes_of(here.get("code")))
        return (
            f"other code ({what}): starting from the beginning. To resume it instead, press Ctrl-C now and start the "
            "same command with the earlier code."
        )

    def hand_on(self, other: "Checkpoints") -> None:
        """Save this run's newest checkpoint as a checkpoint of another run."""
        saved = self.load()
        other.save(saved.step, saved.tensors, saved.values)

    def remove(self) -> None:
        """Delete both checkpoints, once the run's results are written."""
        for name in (NEWEST, PREVIOUS):
            (self.folder / name).unlink(missing_ok=True)


def random_states() -> dict[str, Tensor]:
    """torch's random states: of the CPU, and of each CUDA device if CUDA is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda{number}": state for number, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set the states that `random_states` gave. States of devices that are missing here are ignored."""
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
    """The state of an optimizer for one parameter (Adam: two moments and the number of steps)."""
    return dict(optimizer.state.get(parameter, {}))


def restore_optimizer(optimizer: torch.optim.Optimizer, parameter: Tensor, state: dict[str, Tensor]) -> None:
    """Restore the state that `optimizer_state` gave. The number of steps stays on the CPU, where torch puts it."""
    if state:
        optimizer.state[parameter] = {
            name: value if name == "step" else value.to(parameter) for name, value in state.items()
        }


def training_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters by name, and the state of their optimizer for each."""
    tensors = {f"parameters.{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        kept = optimizer_state(optimizer, parameter)
        tensors |= {f"optimizer.{key}.{name}": value for key, value in kept.items()}
    return tensors


@torch.no_grad()
def restore_training(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state that `training_state` gave."""
    kept: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for full, tensor in tensors.items():
        if full.startswith("optimizer."):
            _, key, name = full.split(".", 2)
            kept[name][key] = tensor
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameters.{name}"])
        restore_optimizer(optimizer, parameter, kept[name])


def state_of(**parts: Any) -> dict[str, Tensor]:
    """The tensors of several objects with a `state()` method, named `<object>.<tensor>`."""
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state().items()}


def part_of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one object in the result of `state_of`."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def restore_parts(tensors: Mapping[str, Tensor], parts: Mapping[str, Any], *where: torch.device) -> None:
    """Restore each object from the tensors that `state_of(**parts)` gave; `where` goes to its `restore` method."""
    for name, part in parts.items():
        part.restore(part_of(tensors, name), *where)


def _digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
