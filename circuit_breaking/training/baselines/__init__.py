"""Other ways to remove a behaviour, to compare cut edges with: one file each, and one line in `METHODS`.

First file to read: `base`, what a method is. Methods with a loss are trained by `training.finetune`; those that edit
weights without a loss choose among a few candidates (`search`). This file is read before torch is imported, for the
choices of `--methods`.
"""

from importlib import import_module
from typing import Any

HERE = "circuit_breaking.training.baselines"

# name -> "module:method", or the `Method` or `Edit` itself
METHODS: dict[str, Any] = {
    "joint": f"{HERE}.gradients:JOINT",
    "ascent": f"{HERE}.gradients:ASCENT",
    "task_arithmetic": f"{HERE}.gradients:TASK_ARITHMETIC",
    "npo": f"{HERE}.npo:NPO",
    "rmu": f"{HERE}.rmu:RMU",
    "lora_npo": f"{HERE}.npo:LORA_NPO",
    "rerouting": f"{HERE}.rerouting:REROUTING",
    "steering": f"{HERE}.steering:STEERING",
    "direction": f"{HERE}.direction:DIRECTION",
}


def baseline(name: str) -> Any:
    """The `Method` or `Edit` of a name in `METHODS`."""
    entry = METHODS[name]
    if isinstance(entry, str):
        module, attribute = entry.split(":")
        entry = getattr(import_module(module), attribute)
    return entry
