"""Learn which few edges to cut so that a model stops producing toxic text (the paper's main experiment).

Reads   a model; toxic posts for training and held-out ones; ordinary text; ablation values, if --means names a file.
Writes  data/toxicity/<run>/: settings.json; metrics.jsonl, one row per step; mask.safetensors; edges.json, the cut
        edges; graph.json, how important each is, and drawn from it graph.png, heat_map.png and edges.tex (LaTeX);
        means.safetensors, if ablation constants are learned, and mean_outputs.safetensors, if they start from mean
        outputs that no file gives. Methods that rank edges also write ranking.safetensors; curve.json and curve.png,
        the held-out losses by budget; and in masks/ the mask, edges and constants for each of --budgets, and for
        --max-edges controls of the constants (docs/methods.md). report.html shows all of these in a browser. During
        training also checkpoints, from which the same command continues an interrupted run.
Time    a minute for the shipped model on two cores; seconds per step for GPT-2 small on two cores.

`accelerate launch toxicity/train_mask.py` trains on several GPUs, each with its share of every batch.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.settings import HeldOutSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_counts, check_not_negative, resolve_defaults
from circuit_breaking.runs.settings import (
    AblateFromSettings,
    ModelSettings,
    OffloadSettings,
    ResumeSettings,
    TrackingSettings,
)
from circuit_breaking.toxicity.settings import (
    ToxicDataSettings,
    ToxicRunSettings,
    default_constants,
    default_data,
    require_data,
)
from circuit_breaking.training.config import MaskConfig, check_mask


@dataclass
class Settings(
    MaskConfig,
    HeldOutSettings,
    ToxicDataSettings,
    ModelSettings,
    OffloadSettings,
    AblateFromSettings,
    ToxicRunSettings,
    ResumeSettings,
    TrackingSettings,
):
    MOST_USED: ClassVar = (
        "model", "max_edges", "budgets", "steps", "alpha", "batch_size", "means", "constants_lr", "examples", "run",
        "seed", "device",
    )  # fmt: skip

    means: Path | None = None  # ablation values from compute_means.py; None: zero, or mean outputs if they are learned
    constants_lr: float | None = None  # learning rate of constants; 0: none; None: 0.02, but 0 with means and for tiny
    constants_loss: Literal["keep", "objective"] | None = None  # loss that they minimise; None: objective, tiny: keep
    examples: int = 100  # toxic texts to learn from; 0: all of the file
    inside: Path | None = None  # file of a circuit, or of edges that a mask cuts: only these may be cut; None: all may
    localise: Literal["no", "eap", "eap-ig", "random"] = "no"  # cut only edges with the highest attribution scores
    localise_edges: int = 1000  # localise: how many edges
    from_mask: Path | None = None  # mask.safetensors to start from, such as that of a finished run; None: no edge cut
    eval_every: int = 0  # steps after which held-out losses are measured for metrics.jsonl; 0: only at the end
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    tf32: bool = False  # let CUDA multiply float32 matrices in TF32: faster, less precise

    def resolved(self) -> "Settings":
        """These settings, with what follows from the model in place of None."""
        return resolve_defaults(self, default_data(self.model), default_constants(self.model, self.means))

    def check(self) -> None:
        check_mask(self.resolved())
        check_counts(self, "length", "num_texts")
        check_ablate_from(self)
        check_not_negative(self, "eval_every")
        if self.inside is not None and self.localise != "no":
            raise UserError("inside and localise both say which edges may be cut. Give one of them.")
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings, parallel=True)

from functools import partial

import torch

from circuit_breaking.engine.ablation_values import load_means, save_mean_outputs, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.evaluation.constant_controls import write_constant_controls
from circuit_breaking.evaluation.edge_importance import graph_of_mask
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.edge_curve import draw_curve
from circuit_breaking.figures.edges import draw_edges
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.circuit_files import read_circuit
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.mask_record import (
    CUT_EDGES,
    MASK,
    MEAN_OUTPUTS,
    MEANS,
    AblationValueRecord,
    MaskRecord,
    MeansRecord,
    data_of,
    write_edges,
)
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.ranking_record import CURVE, RANKING, Curve, RankingRecord
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.runs.run_folder import hold
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.training.budgets import masks_at
from circuit_breaking.training.edge_ranking import save_ranking
from circuit_breaking.training.localise import localise
from circuit_breaking.training.mask_gradient import MaskFunction
from circuit_breaking.training.mask_trainer import MaskResult
from circuit_breaking.training.run import train_into

MASKS = "masks"  # folder of the masks of all budgets
NOTHING_CUT = "No edge was worth cutting on training texts. A larger --alpha or more --steps may find some."
LEARN_CONSTANTS = (
    "So may ablation constants that are learned to break the behaviour: --constants-lr 0.02 --constants-loss objective."
)
MEAN_TEXTS = 300  # most texts of the mean outputs that constants start from


def main(settings: Settings) -> None:
    settings.check()
    settings = settings.resolved()
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    ordinary = OWTTask(
        tokenizer, settings.ordinary, settings.length, seed=settings.seed, text_column=settings.text_column
    )
    toxic = ToxicTask(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.length, settings.examples or None, settings.seed
    )
    model = load_model(
        settings.model, settings.split_qkv, settings.device, settings.dtype, offload=settings.offload,
        device_map=settings.device_map or None,
    )  # fmt: skip
    model.ablate_from = settings.ablate_from
    check_mask(settings, len(model.graph))  # before anything is written
    inputs = [settings.toxic_train, settings.toxic_test, *files_of(settings.model)]
    if settings.means is not None:
        load_means(settings.means, model)
        inputs.append(settings.means)
    inputs += [path for path in (settings.inside, settings.from_mask) if path is not None]
    if Path(settings.ordinary).is_file():
        inputs.append(Path(settings.ordinary))
    run = provenance(settings, inputs)
    with hold(folder):
        train(folder, model, {"ordinary": ordinary, "toxic": toxic}, run, settings)


def train(
    folder: Path, model: EdgeMaskedTransformer, tasks: dict[str, TextTask], run: dict[str, Any], settings: Settings
) -> None:
    """Train the mask and write the run folder, which the caller holds; `run` is the run's provenance."""
    if is_main():
        RunSettings(script="toxicity/train_mask.py", provenance=run).write(folder / "settings.json")
    for task in tasks.values():
        task.evaluation_batch = settings.micro_batch or task.evaluation_batch
    averages = mean_outputs(folder, model, tasks["ordinary"], run, settings)
    before = held_out(model, tasks, settings)
    allowed, start = edges_to_cut(model, tasks, settings), mask_to_start_from(model, settings)
    result = train_into(
        folder, model, tasks["toxic"], tasks["ordinary"], settings, allowed, run, settings.resume,
        settings.checkpoint_every, lock=False, log_with=settings.log_with, start=start,
        eval_tasks=tasks if settings.eval_every else None, eval_every=settings.eval_every,
        eval_texts=settings.num_texts,
    )  # fmt: skip
    if is_main():
        after = held_out(model, tasks, settings)
        write_mask(folder, model, settings.max_edges, run, settings, {"before": before, "after": after})
        importance = graph_of_mask(model, toxic_losses(tasks["toxic"], model, settings), "fall of toxic loss, nats")
        importance.write(folder / "graph.json")
        draw_edges(folder)
        for name in tasks:
            print(f"held-out loss on {name} text: {before[name]:.3f} -> {after[name]:.3f}")
        edges = ", ".join(result.edges)
        print(f"{len(result.edges)} of {len(model.graph):,} edges cut in {result.seconds:.0f} s: {edges or 'none'}")
        if settings.max_edges and not result.edges:
            learned = settings.constants_lr and settings.constants_loss == "objective"
            print(NOTHING_CUT if learned else f"{NOTHING_CUT} {LEARN_CONSTANTS}")
    if result.ranking is not None:
        write_ranking(folder, model, tasks, run, settings, result, before, averages)
    elif is_main():  # those of an earlier run would not be what the page is about
        for name in (RANKING, CURVE):
            (folder / name).unlink(missing_ok=True)
    end_with_page(folder)
    if is_main():
        print(f"written to {folder}")


def mean_outputs(
    folder: Path, model: EdgeMaskedTransformer, ordinary: TextTask, run: dict[str, Any], settings: Settings
) -> Path | None:
    """The file of the ablation values that the model has; None if they are zero.

    If constants are learned and the settings name no file, these are mean outputs on ordinary training texts, which the
    model gets here.
    """
    if settings.means is not None or not settings.constants_lr or not settings.max_edges:
        return settings.means
    path = folder / MEAN_OUTPUTS
    model.means = save_mean_outputs(path, model, ordinary.train[:MEAN_TEXTS], run, write=is_main())
    return path


def edges_to_cut(model: EdgeMaskedTransformer, tasks: dict[str, TextTask], settings: Settings) -> torch.Tensor | None:
    """The edges that may be cut, bool [E]; None if all may be."""
    if settings.inside is not None:
        circuit = read_circuit(settings.inside, model.graph)
        of_mask = settings.inside.name == CUT_EDGES or settings.inside.suffix == Path(MASK).suffix
        return (~circuit.kept if of_mask else circuit.kept).to(model.device)  # a mask is about the edges that it cuts
    if settings.localise == "no":
        return None
    count = min(settings.localise_edges, len(model.graph))
    return localise(model, tasks["toxic"], tasks["ordinary"], settings, settings.localise, count, settings.seed)


def mask_to_start_from(model: EdgeMaskedTransformer, settings: Settings) -> torch.Tensor | None:
    """The mask to start from, [E]; None to start with no edge cut."""
    if settings.from_mask is None:
        return None
    load_mask(settings.from_mask, model)
    model.ablate_from = settings.ablate_from
    start = model.mask.weights.detach().clone()
    model.mask.reset_()
    return start


def held_out(model: EdgeMaskedTransformer, tasks: dict[str, TextTask], settings: Settings) -> dict[str, float]:
    """Loss on held-out texts of each task, with the mask that is in the model."""
    return {name: task.get_test_loss(model, settings.num_texts) for name, task in tasks.items()}


def write_mask(
    folder: Path, model: EdgeMaskedTransformer, budget: int, run: dict[str, Any], settings: Settings,
    losses: dict[str, Any],
) -> AblationValueRecord:  # fmt: skip
    """Write the mask that is in the model, and its ablation constants if they are learned. Returns what they are."""
    learned = bool(settings.constants_lr) and model.means is not None
    if learned:
        save_means(folder / MEANS, model, model.means, MeansRecord(provenance=run))
    value = value_in(folder / MEANS if learned else settings.means, learned)
    record = MaskRecord(
        method=settings.method, budget=budget, seed=settings.seed, provenance=run, ablation_value=value,
        losses=losses, data=data_of(asdict(settings)),
    )  # fmt: skip
    save_mask(folder / MASK, model, record)
    write_edges(folder, model.mask.cut_edges())
    return value


def write_ranking(
    folder: Path, model: EdgeMaskedTransformer, tasks: dict[str, TextTask], run: dict[str, Any], settings: Settings,
    result: MaskResult, before: dict[str, float], averages: Path | None,
) -> None:  # fmt: skip
    """Write the ranking, a mask of each budget, and the curve of their held-out losses.

    `averages`: file of the values that learned constants started from.
    """

    def objective(losses: dict[str, float]) -> float:
        return settings.keep_weight * losses["ordinary"] - settings.alpha * losses["toxic"]

    rows, value = [], value_in(settings.means)
    budgets = {*settings.budgets, settings.max_edges} - {0}
    # all processes train the constants of each mask together, and the main one writes
    for budget in masks_at(budgets, result, model, tasks["toxic"], tasks["ordinary"], settings):
        if is_main():
            losses = held_out(model, tasks, settings)
            cut = model.mask.n_cut()
            rows.append({"budget": budget, "edges_cut": cut, **losses, "gain": objective(before) - objective(losses)})
            if cut < budget:
                print(f"budget {budget}: {cut} edges cut, because more were worse on training texts")
            value = write_mask(
                folder / MASKS / f"{settings.method}_{budget}", model, budget, run, settings,
                {"before": before, "after": losses},
            )  # fmt: skip
    if not is_main():
        return
    largest = folder / MASKS / f"{settings.method}_{settings.max_edges}"
    if settings.constants_lr and averages is not None and (largest / MEANS).is_file():
        write_constant_controls(largest, model, averages)
    record = RankingRecord(method=settings.method, seed=settings.seed, ablation_value=value, provenance=run)
    save_ranking(folder / RANKING, model, result.ranking, record)
    Curve(original=before, rows=rows, provenance=run).write(folder / CURVE)
    if rows:
        draw_curve(folder)


def toxic_losses(task: TextTask, model: EdgeMaskedTransformer, settings: Settings) -> list[MaskFunction]:
    """Minus the toxic loss on batches of 40 training texts, as functions of the mask."""

    def metric(mask: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        return -task.loss(model, batch, mask)

    size = min(settings.batch_size, settings.micro_batch or settings.batch_size)
    return [partial(metric, batch=batch.to(model.device)) for batch in task.train[:40].batches(size)]


if __name__ == "__main__":
    run_script(main, settings)
