"""Every model family at its true shapes: how exact the engine is, how many edges there are, what a step costs.

Models have random weights; norms and biases are moved away from ones and zeros so that all of them have an effect.
Exactness is the largest difference between a logit of the engine and one of Hugging Face: with all edges kept, and with
`cut` random edges cut, which are cut in the Hugging Face model too. Times are medians of steps that take turns; on a
CPU with one thread they are CPU times, which the work of other programs hardly changes.

Reads   the rows of other shapes from earlier results in `out`.
Writes  data/benchmarks/families.json, one row per shape; prints it as a table.
Time    from half a minute (gpt2) to half an hour (gpt2-xl, 12 GB) per shape on one core; --shapes gpt2 for one alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from step_settings import StepSettings

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, read_json, write_json


@dataclass
class Settings(StepSettings):
    MOST_USED: ClassVar = ("shapes", "rounds", "batch", "length", "threads", "device", "dtype", "out")

    shapes: tuple[str, ...] = ()  # shapes to measure: gpt2, pythia-160m, ..., see steps.SHAPES; none: all
    rounds: int = 5  # steps of each variant, which take turns; the median counts; 0: no times
    threads: int = 1
    out: Path = DATA / "benchmarks" / "families.json"  # file in which results are gathered


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
from steps import SHAPES, binary_mask, check_shapes, make_hf, make_tokens, medians

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance

COLUMNS = {  # of the table: field of a row, and how it is shown
    "shape": ("shape", "{}"),
    "parameters": ("parameters", "{:,}"),
    "edges": ("edges", "{:,}"),
    "separate q, k, v": ("edges_split", "{:,}"),
    "difference": ("difference", "{:.1e}"),
    "edges cut": ("difference_cut", "{:.1e}"),
    "tokens": ("tokens", "{}"),
    "plain, s": ("plain", "{:.2f}"),
    "binary": ("ratio_binary", "{:.2f}"),
    "any": ("ratio_any", "{:.2f}"),
}
TITLE = (
    "Largest logit difference to Hugging Face, whole and with edges cut;\n"
    "seconds of a plain step, and steps with a binary and with any mask as multiples of it"
)


@dataclass
class Shape:
    """What `steps` wants to know of one shape."""

    shape: str
    batch: int
    length: int
    device: str
    dtype: str


@torch.no_grad()
def differences(hf: torch.nn.Module, engine: torch.nn.Module, tokens: torch.Tensor, cut: int) -> tuple[float, float]:
    """Largest differences of a logit between engine and stock model: all edges whole, and `cut` of them cut."""
    whole = (engine(tokens) - hf(tokens).logits).abs().max()
    mask = binary_mask(len(engine.graph), cut).to(engine.mask.weights)
    edges = [engine.graph.edges[index] for index in (mask == 0).nonzero()[:, 0].tolist()]
    with ablate(hf, edges):
        ablated = (engine(tokens, mask=mask) - hf(tokens).logits).abs().max()
    return float(whole), float(ablated)


def measure(settings: Settings, shape: str) -> dict:
    """One row of the table."""
    about = Shape(shape, settings.batch, settings.length, settings.device, settings.dtype)
    hf, tokens = make_hf(about), make_tokens(about)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    engine = load_model(hf, device=settings.device, dtype=settings.dtype)
    difference, difference_cut = differences(hf, engine, tokens[:2], settings.cut)
    row = {
        "shape": shape,
        "family": hf.config.model_type,
        "parameters": sum(parameter.numel() for parameter in hf.parameters()),
        "edges": len(engine.graph),
        "edges_split": len(replace(engine.graph, split_qkv=True)),
        "difference": difference,
        "difference_cut": difference_cut,
        "tokens": f"{settings.batch} x {settings.length}",
        "device": str(engine.device) if engine.device.type == "cpu" else torch.cuda.get_device_name(engine.device),
    }
    if settings.rounds:
        computed = engine.device.type == "cpu" and settings.threads == 1
        middle = medians(hf, engine, tokens, settings.cut, settings.rounds, computed)
        row |= {"plain": middle["plain"]}
        row |= {f"ratio_{name}": middle[name] / middle["plain"] for name in ("binary", "any")}
    return row


def show(rows: dict[str, dict]) -> None:
    """Print the rows as a table, in the order of `SHAPES`."""
    cells = [
        ["–" if (value := rows[name].get(field)) is None else form.format(value) for field, form in COLUMNS.values()]
        for name in SHAPES
        if name in rows
    ]
    print_table(list(COLUMNS), cells, TITLE)


def main(settings: Settings) -> None:
    settings.check()
    check_shapes(*settings.shapes)
    torch.set_num_threads(settings.threads)
    rows = read_json(settings.out)["rows"] if settings.out.is_file() else {}
    for shape in settings.shapes or SHAPES:
        rows[shape] = {**measure(settings, shape), "provenance": provenance(settings)}
        write_json(settings.out, {"rows": rows})
    show(rows)


if __name__ == "__main__":
    run_script(main, settings)
