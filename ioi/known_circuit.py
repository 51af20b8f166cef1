"""Compare a mask with the published circuit of GPT-2 small (Wang et al. 2023): precision, recall, picture.

Reads   data/ioi/<run>/graph.json, which the mask scripts here write; the mask must be of GPT-2 small.
Writes  data/ioi/<run>/known_circuit.json, known_circuit.png.
Time    a second.
"""

from dataclasses import dataclass
from typing import ClassVar

from circuit_breaking.ioi.settings import IOIRunSettings
from circuit_breaking.runs.cli import read_settings, run_script


@dataclass
class Settings(IOIRunSettings):
    MOST_USED: ClassVar = ("run", "out")


if __name__ == "__main__":
    settings = read_settings(Settings)

from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.edge_graph import draw_graph, read_graph
from circuit_breaking.ioi.known_circuits import HEADS, overlap
from circuit_breaking.runs.ioi_results import KnownCircuit
from circuit_breaking.runs.provenance import provenance


def main(settings: Settings) -> None:
    folder = settings.out / settings.run
    path = folder / "graph.json"
    graph, edges, record = read_graph(path)
    found = overlap(graph, edges)
    known = KnownCircuit(
        graph=record["graph"],
        what=record.get("what", "cut"),
        edges=record["edges"],
        measure=record.get("measure", "importance"),
        classes=HEADS,
        in_circuit=found["in_circuit"],
        overlap={key: found[key] for key in ("edges", "heads", "classes")},
        provenance=provenance(settings, [path]),
    )
    known.write(folder / "known_circuit.json")
    draw_graph(folder, "known_circuit")
    end_with_page(folder)
    for what in ("edges", "heads"):
        one = found[what]
        precision = "–" if one["precision"] is None else f"{one['precision']:.2f}"
        print(
            f"{what}: {one['shared']} of the mask's {one['found']} are in the circuit's {one['known']}: "
            f"precision {precision} (by chance {one['by_chance']:.3f}), recall {one['recall']:.2f}"
        )
    for name, one in found["classes"].items():
        print(f"  {name}: {one['touched']} of {one['heads']} heads touched")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
