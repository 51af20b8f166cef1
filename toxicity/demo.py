"""Run the toxicity job on the shipped model, end to end: train a mask of at most 12 edges, then measure it.

Reads   data/tiny_gpt2/ and settings given here; each part is a script of this folder and can be run by itself.
Writes  data/toxicity/demo/: all that train_mask.py and evaluation.py write.
Time    two minutes on two cores.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.files import read_json
from circuit_breaking.toxicity.inputs import FOLDER

HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    run: str = "demo"  # name of the run folder, data/toxicity/<run>
    out: Path = FOLDER  # where run folders are
    scorer: str = "profanity-check"  # offline, and what the shipped model was made with; or detoxify, or auto
    save_generations: bool = False  # keep what the models write; the shipped model knows mild insults only
    device: str = "cpu"  # the shipped model is too small to gain from a GPU
    threads: int = 1  # CPU threads of each part; more only wait for each other on a model of this size


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
    before, after = (read_json(folder / "report.json")["models"][name] for name in ("original", "ablated"))
    share = [one["continuations"]["toxic"]["toxic_share"]["value"] for one in (before, after)]
    loss = [one["losses"]["ordinary"]["value"] for one in (before, after)]
    print(
        f"\n{after['edges_cut']} edges cut: toxic continuations {share[0]:.0%} -> {share[1]:.0%}, "
        f"loss on ordinary text {loss[0]:.3f} -> {loss[1]:.3f} nats"
    )
    print(", ".join(f"{script} {spent:.0f} s" for script, spent in seconds.items()))
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    print(f"results in {folder}: {', '.join(names)}")


if __name__ == "__main__":
    run_script(main, Settings)
