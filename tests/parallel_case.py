"""What `test_parallel.py` runs in one process and in several: masks by every method, noted by each in a JSON file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.models import small_gpt2
from helpers.tasks import FEW, QUICK, SHORT_CHOICE, make_prompts, make_task

from circuit_breaking.engine.load import load_model
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.distributed import is_main, sum_, world
from circuit_breaking.runs.files import write_json
from circuit_breaking.training import prefix_choice
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import METHODS

CASES = {  # 3 and 4 texts of each task a batch: the first cannot be shared evenly by two
    **{method: {"method": method} for method in METHODS},
    "integrated mask gradients": {"method": "attribution", "ig_steps": 4},
    "means": {"constants_lr": 0.05},
    "means for all": {"constants_lr": 0.05, "constants_loss": "objective"},
    "parts": {"micro_batch": 1, "constants_lr": 0.05},
    "few": {"batch_size": 1, "refine_batch_size": 1},  # so that one of two has none of a task
    "IOI": {},
    "IOI, counterfactual": {},
}
PHASES = {"steps": 4, "refine_rounds": 2}


@dataclass
class Settings:
    out: Path  # folder for the files
    processes: int  # how many there should be


def main(settings: Settings) -> None:
    assert world().size == settings.processes
    assert float(sum_(torch.tensor(world().rank + 1.0))) == sum(range(1, settings.processes + 1))
    found = {}
    for name, changes in CASES.items():
        torch.manual_seed(world().rank)  # gates are drawn as the first process draws them
        model = load_model(small_gpt2(**FEW).double(), device="auto" if world().size > 1 else "cpu", dtype="float64")
        model.resample = name.endswith("counterfactual")
        prompts = name.startswith("IOI")
        broken = make_prompts("break", 1, "cross_entropy", model.resample) if prompts else make_task("break", 1)
        training = MaskConfig(**{**QUICK, **PHASES, **changes}, max_edges=9)
        result = train_mask(model, broken, make_task("keep", 5), training, progress=False)
        means = [] if model.means is None else model.means.flatten().tolist()
        rows = [[row[key] for key in ("loss", "keep_loss", "break_loss", "n_cut")] for row in result.history]
        found[name] = {"rows": rows, "weights": result.weights.tolist(), "means": means}
    write_json(settings.out / f"{world().rank}_of_{world().size}.json", {"main": is_main(), "found": found})


if __name__ == "__main__":
    prefix_choice.BATCHES = SHORT_CHOICE  # as the test does in its own process
    run_script(main, read_settings(Settings, parallel=True))
