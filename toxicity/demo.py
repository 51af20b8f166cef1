"""Run the toxicity experiment on the shipped model from end to end: train a mask of at most 12 edges and measure it.

Reads   data/tiny_gpt2/. The two parts, train_mask.py and evaluation.py, can also be run one by one.
Writes  data/toxicity/demo/: everything that train_mask.py and evaluation.py write.
Time    two minutes on two cores.
"""

from dataclasses import dataclass
from typing import ClassVar

from circuit_breaking.evaluation.settings import ScorerSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import DeviceSettings
from circuit_breaking.toxicity.settings import ToxicRunSettings


@dataclass
class Settings(ToxicRunSettings, ScorerSettings, DeviceSettings):
    MOST_USED: ClassVar = ("run", "out", "scorer", "save_generations", "device", "threads")

    run: str = "demo"
    scorer: str = "profanity-check"  # profanity-check (offline; the shipped model was made with it), detoxify or auto
    save_generations: bool = False  # keep the texts that the models write; the shipped model writes mild insults only
    device: str = "cpu"  # cpu, cuda, mps or auto; the shipped model is too small to gain from a GPU
    threads: int = 1  # CPU threads of each part; a model of this size gains nothing from more

    def check(self) -> None:
        check_counts(self, "threads")


if __name__ == "__main__":
    settings = read_settings(Settings)

import os
import subprocess
import sys
import time
from pathlib import Path

from circuit_breaking.errors import UserError
from circuit_breaking.figures.browser.page import PAGE
from circuit_breaking.runs.results import REPORT, Report

HERE = Path(__file__).resolve().parent


def main(settings: Settings) -> None:
    common = [f"--run={settings.run}", f"--out={settings.out}", f"--device={settings.device}"]
    keep = "--save-generations" if settings.save_generations else "--no-save-generations"
    parts = {
        "train_mask.py": common,
        "evaluation.py": [*common, f"--scorer={settings.scorer}", keep],
    }
    seconds = {}
    for script, options in parts.items():
        print(f"\n== toxicity/{script} {' '.join(options)}", flush=True)
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads)}
        code = subprocess.run([sys.executable, HERE / script, *options], env=environment, check=False).returncode
        if code:
            raise UserError(f"toxicity/{script} ended with exit code {code}; what it said above tells why.")
        seconds[script] = time.perf_counter() - start
    folder = settings.out / settings.run
    before, after = (Report.read(folder / REPORT).models[name] for name in ("original", "ablated"))
    share = [one["continuations"]["toxic"]["toxic_share"]["value"] for one in (before, after)]
    loss = [one["losses"]["ordinary"]["value"] for one in (before, after)]
    print(
        f"\n{after['edges_cut']} edges cut: toxic continuations {share[0]:.0%} -> {share[1]:.0%}, "
        f"loss on ordinary text {loss[0]:.3f} -> {loss[1]:.3f} nats"
    )
    print(", ".join(f"{script} {spent:.0f} s" for script, spent in seconds.items()))
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    print(f"results in {folder}: {', '.join(names)}")
    print(f"open {folder / PAGE} in a browser to look at them")


if __name__ == "__main__":
    run_script(main, settings)
