"""Write the controls of a mask with learned constants: the constants without the cut, and the cut without them."""

from pathlib import Path

from circuit_breaking.engine.ablation_values import read_means, save_means
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.evaluation.controls import OF_CONSTANTS, control_values
from circuit_breaking.runs.mask_record import CONTROL, CUT_EDGES, MASK, MEANS, ControlRecord, CutEdges, MeansRecord
from circuit_breaking.runs.run_folder import is_up_to_date


def write_constant_controls(folder: Path, model: EdgeMaskedTransformer, averages: Path, resume: bool = False) -> None:
    """Write the controls of `controls.OF_CONSTANTS` beside a mask's folder: `<folder>_bias`, and so on.

    Nothing is written if `averages` does not hold one mean output for each node, but learned constants, or means by
    position: what a cut removes on average is then not known.

    Args:
        folder: holds the mask, its edges and its learned constants.
        model: a model of the mask's shape.
        averages: file of mean outputs of the nodes.
        resume: keep controls that were made for this mask.
    """
    means, about_means = read_means(averages)
    if about_means.num_texts is None or means.dim() != 2:
        return
    record, edges = read_mask_record(folder / MASK), CutEdges.read(folder / CUT_EDGES).edges
    constants = read_means(folder / MEANS)[0]
    for control, (about, removes) in OF_CONSTANTS.items():
        place = folder.with_name(f"{folder.name}_{control}")
        if resume and is_up_to_date(place / CONTROL, record.made_from, ControlRecord.read):
            continue
        values = control_values(control, constants, means)
        save_means(place / MEANS, model, values, MeansRecord(provenance=record.provenance))
        ControlRecord(
            about=about.format(folder.name), edges=edges, removes=removes, ablate_from=record.ablate_from,
            budget=record.budget, seed=record.seed, made_from=record.made_from, provenance=record.provenance,
        ).write(place / CONTROL)  # fmt: skip
