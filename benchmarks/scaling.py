"""How the cost of a mask-training step grows with layers and with heads, next to a plain step of the same model.

The models have GPT-2's width and vocabulary and random weights: 6 to 48 layers of 12 heads, and 12 layers of 6 to 48
heads. The number of edges grows with the square of both. Beyond the plain model, a step computes the product of mask
and node outputs, which grows like the edges, and reads, norms and projects a residual stream for every head, which
grows like the heads.

Reads   nothing; with --redraw, its own earlier results.
Writes  benchmarks/scaling.json and benchmarks/scaling.png, or the files that `out` names.
Time    ten minutes on two cores.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from step_settings import StepSettings

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import read_json, write_json


@dataclass
class Settings(StepSettings):
    MOST_USED: ClassVar = ("layers", "heads", "rounds", "redraw", "out", "threads", "device", "dtype")

    layers: tuple[int, ...] = (6, 12, 24, 48)  # numbers of layers, at 12 heads
    heads: tuple[int, ...] = (6, 12, 24, 48)  # numbers of heads, at 12 layers; the width stays, heads get narrower
    width: int = 768  # width of the residual stream
    redraw: bool = False  # draw earlier results again and measure nothing
    out: Path = Path(__file__).resolve().parent / "scaling.json"  # results; the picture has the same name with .png


if __name__ == "__main__":
    settings = read_settings(Settings)

from types import SimpleNamespace

import torch
from steps import make_hf_of, make_tokens, medians
from transformers import GPT2Config

from circuit_breaking.engine.load import load_model
from circuit_breaking.figures.style import COLOURS, MARKERS, figure
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance

MASKS = {"binary": "binary mask (50 edges cut)", "any": "any mask (every weight below 1)"}


def measure(settings: Settings, layers: int, heads: int) -> dict:
    """Seconds of a plain step, and of steps with both kinds of mask as multiples of it."""
    config = GPT2Config(n_layer=layers, n_head=heads, n_embd=settings.width)
    hf = make_hf_of(config, settings.device, settings.dtype)
    engine = load_model(hf, device=settings.device, dtype=settings.dtype)
    tokens = make_tokens(
        SimpleNamespace(shape="gpt2", batch=settings.batch, length=settings.length, device=settings.device)
    )
    middle = medians(hf, engine, tokens, settings.cut, settings.rounds)
    ratios = {name: middle[name] / middle["plain"] for name in MASKS}
    return {"layers": layers, "heads": heads, "edges": len(engine.graph), "plain": middle["plain"], **ratios}


def draw(rows: list[dict], path: Path) -> None:
    """Ratio to the plain model by layers and by heads."""
    with figure(path, 6.4, 2.9) as drawn:
        panels = drawn.subplots(1, 2, sharey=True)
        for axes, by, fixed in zip(panels, ("layers", "heads"), ("heads", "layers"), strict=True):
            mine = sorted((row for row in rows if row["grows"] == by), key=lambda row: row[by])
            for number, (name, label) in enumerate(MASKS.items()):
                at = [row[by] for row in mine], [row[name] for row in mine]
                axes.plot(*at, marker=MARKERS[number], markersize=4.5, color=COLOURS[number], label=label)
            for row in mine:
                axes.annotate(
                    f"{row['edges']:,}\nedges", (row[by], 0.06), fontsize=6, color="#555555", ha="center", va="bottom"
                )
            axes.axhline(1, color="#000000", linewidth=0.7, linestyle=(0, (3, 3)))
            axes.set_xscale("log", base=2)
            axes.set_xticks([row[by] for row in mine], [str(row[by]) for row in mine])
            axes.set_xlabel(f"{by}, at {mine[0][fixed]} {fixed}")
            axes.margins(x=0.12)
        panels[0].set(ylabel="step, multiple of plain GPT-2", ylim=(0, None))
        drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)


def main(settings: Settings) -> None:
    settings.check()
    torch.set_num_threads(settings.threads)
    picture = settings.out.with_suffix(".png")
    if settings.redraw:
        draw(read_json(settings.out, "Measure first, without --redraw.")["rows"], picture)
        return
    shapes = [("layers", layers, 12) for layers in settings.layers] + [("heads", 12, heads) for heads in settings.heads]
    known: dict[tuple[int, int], dict] = {}
    rows, cells = [], []
    for grows, layers, heads in shapes:
        if (layers, heads) not in known:
            known[layers, heads] = measure(settings, layers, heads)
        row = {"grows": grows, **known[layers, heads]}
        rows.append(row)
        size = [str(layers), str(heads), f"{row['edges']:,}"]
        cells.append(size + [f"{row[name]:.2f}" for name in ("plain", *MASKS)])
    # not where: results go with the code
    write_json(settings.out, {**provenance(replace(settings, out=Path(settings.out.name))), "rows": rows})
    draw(rows, picture)
    header = ["layers", "heads", "edges", "plain, s", *MASKS]
    print_table(header, cells, f"{settings.batch} x {settings.length} tokens, {settings.dtype}")


if __name__ == "__main__":
    run_script(main, settings)
