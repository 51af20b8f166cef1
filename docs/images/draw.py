"""Draw the picture of the README, from the files of the demo.

Reads   data/toxicity/demo/evidence.json, which `toxicity/edge_evidence.py --run demo --masks data/toxicity/demo`
        makes from the mask of `make demo`.
Writes  docs/images/edges.png: the cut edges of the shipped model, wider where restoring one edge alone lowers the
        loss on toxic text more, that is, brings back more of the behaviour.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from circuit_breaking.evaluation.result_files import read_evidence
from circuit_breaking.figures.edge_graph import draw_graph
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, write_json
from circuit_breaking.runs.ioi_results import GraphRecord

SHIPPED = EdgeGraph(n_layers=4, n_heads=4)


@dataclass
class Settings:
    run: Path = DATA / "toxicity" / "demo"  # run folder of toxicity/edge_evidence.py
    picture: Path = Path(__file__).resolve().parent / "edges.png"  # file to write


def main(settings: Settings) -> None:
    (mask,) = read_evidence(settings.run)["masks"].values()
    effects = {row["edge"]: row["restore_effect"]["toxic"]["value"] for row in mask["edges"]}
    with TemporaryDirectory() as folder:
        write_json(
            Path(folder) / "graph.json", GraphRecord.of(SHIPPED, effects, "cut", "fall of toxic loss, nats").to_json()
        )
        settings.picture.write_bytes(draw_graph(folder).read_bytes())


if __name__ == "__main__":
    run_script(main, read_settings(Settings))
