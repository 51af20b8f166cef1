"""Train a mask into a run folder."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.runs.run_folder import recorded
from circuit_breaking.tasks.base import Task
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import MaskResult, train_mask


def train_into(
    folder: Path,
    model: EdgeMaskedTransformer,
    break_task: Task | None,
    keep_task: Task | None,
    settings: MaskConfig,
    allowed: Tensor | None = None,
    run: Mapping[str, Any] | None = None,
    resume: bool = True,
    every: int = 50,
    lock: bool = True,
    log_with: str = "none",
    **keywords: Any,
) -> MaskResult:
    """Call `train_mask` and write the row of every step to `metrics.jsonl` of a run folder.

    If several processes train together, the main one writes; all continue from the same checkpoint.

    Args:
        folder, run, resume, every, lock, log_with: as for `recorded`.
        model, break_task, keep_task, settings, allowed: as for `train_mask`, and so are further `keywords`, such as
            `tasks`, `eval_tasks` and `start`; files that these come from are named among the inputs of `run`.
    """
    if run is not None and allowed is not None:
        run = {**run, "allowed": hashlib.sha256(bytes(allowed.tolist())).hexdigest()}
    with recorded(folder, run, resume, every, lock, log_with) as how:
        return train_mask(model, break_task, keep_task, settings, allowed, **how, **keywords)
