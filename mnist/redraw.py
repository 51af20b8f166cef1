"""Draw the pictures of a run of mnist/main.py or mnist/old.py again, from its result files alone.

Reads report.json, metrics.jsonl, network.safetensors and mask.safetensors of --folder; writes *.png there. Seconds.
"""

from dataclasses import dataclass
from pathlib import Path

from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.mnist.digits import DEFAULT_FOLDER
from circuit_breaking.runs.cli import run_script


@dataclass
class Settings:
    folder: Path = DEFAULT_FOLDER / "main"  # folder of the run


def main(settings: Settings) -> None:
    for path in draw_run(settings.folder):
        print(path)


if __name__ == "__main__":
    run_script(main, Settings)
