"""Draw the pictures of a run of mnist/main.py or mnist/old.py again, from its result files alone.

Reads   mnist_report.json, metrics.jsonl, network.safetensors and masks.safetensors in --folder.
Writes  *.png in the same folder.
Time    seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.mnist.settings import DEFAULT_FOLDER
from circuit_breaking.runs.cli import read_settings, run_script


@dataclass
class Settings:
    MOST_USED: ClassVar = ("folder",)

    folder: Path = DEFAULT_FOLDER / "main"  # run folder whose pictures are drawn


if __name__ == "__main__":
    settings = read_settings(Settings)

from circuit_breaking.figures.mnist import draw_run


def main(settings: Settings) -> None:
    for path in draw_run(settings.folder):
        print(path)


if __name__ == "__main__":
    run_script(main, settings)
