"""Write the report of a run as one HTML page for a browser, from its result files alone.

    python report.py data/toxicity/demo

Reads   the result files in the folder, whichever are there. No model is run.
Writes  report.html in the folder: settings, tables, plots to zoom, and the edges as a graph to explore. It
        needs no network.
Time    seconds.

Every script that writes results into a run folder ends with the same page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tyro

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_not_negative


@dataclass(kw_only=True)
class Settings:
    MOST_USED: ClassVar = ("folder", "generations")

    folder: tyro.conf.Positional[Path]  # folder of a run, or of other results
    generations: int = 0  # prompts of which the models' texts are shown, folded behind a warning: OFFENSIVE TEXT

    def check(self) -> None:
        check_not_negative(self, "generations")


if __name__ == "__main__":
    settings = read_settings(Settings)

from circuit_breaking.figures.browser.page import write_page


def main(settings: Settings) -> None:
    path = write_page(settings.folder, settings.generations)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB); open it in a browser")


if __name__ == "__main__":
    run_script(main, settings)
