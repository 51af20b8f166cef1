"""Settings of everything that is trained, and their checks.

Imports neither torch nor transformers, so that a script can print its `--help` and refuse a setting at once.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import check_choice, check_not_negative, check_positive
from circuit_breaking.training.methods import GIVEN, METHODS

WEIGHT_METHODS = ("clamped", "hard-concrete")
WEIGHT_BUDGETS = {"weight": 0.0005, "neuron": 0.04, "head": 0.25}  # default share of all units that may be masked


@dataclass
class MaskConfig:
    """How an edge mask is trained. Losses are in nats; a step sees `batch_size` texts of each task.

    Temperatures and learning rates of the default method follow from the number of edges and steps (`methods.ranking`).
    """

    TITLE: ClassVar[str] = "mask training"

    max_edges: int = 12  # most edges that the mask cuts
    budgets: tuple[int, ...] = (1, 2, 5, 12, 25, 50)  # ranking: further numbers of edges that its order should serve
    steps: int = 440  # steps that find edges
    batch_size: int = 5  # texts of each task in a step
    alpha: float = 0.2  # weight of the loss that training raises (paper: 0.2); negative: it is lowered instead
    keep_weight: float = 1.0  # weight of the loss that training keeps low; 0: ordinary text does not count
    keep_loss: Literal["kl", "loss"] = "kl"  # kl: KL(original || ablated), as a loss; loss: the task's own (paper)
    break_cap: float = 0.0  # cap on the raised loss of one prediction, nats; 0: log of the vocabulary size
    method: Literal[tuple(METHODS)] = "ranking"  # how the edges to cut are found, before refinement
    lr: float = 0.05  # clamped, hard-concrete, ugs: learning rate of mask weights or of log odds
    edge_penalty: float = 0.0005  # clamped, hard-concrete, ugs: penalty for each cut edge, nats
    ig_steps: int = 0  # attribution: points of integrated mask gradients; 0: gradient at the whole model (EAP)
    refine_rounds: int = 0  # rounds of refinement, which cut or restore single edges if that measurably helps
    refine_batch_size: int = 20  # texts of each task in a round of refinement
    constants_lr: float = 0.0  # learning rate of ablation constants (optimal ablation); 0: they are not learned
    constants_steps: int = 100  # steps at the end in which only the constants are learned
    constants_loss: Literal["keep", "objective"] = "keep"  # loss that ablation constants minimise
    micro_batch: int = 0  # texts in a forward pass, if fewer than batch_size: same result, less memory; 0: all
    gradient_checkpointing: bool = False  # recompute parts of each layer in the backward pass: less memory, more time


@dataclass
class WeightMaskSettings:
    """How a mask over weights is learned. Losses are in nats; a step sees `batch_size` texts of each task."""

    TITLE: ClassVar[str] = "mask training"

    granularity: str = "weight"  # unit that is masked as a whole: weight, neuron or head
    max_masked: int | None = None  # most units to mask; None: 0.05% of weights, 4% of neurons, 25% of heads
    method: str = "clamped"  # weights in [0, 1]: clamped as in the paper, or hard-concrete (Louizos et al. 2018)
    alpha: float = 0.2  # weight of the loss that training raises; negative: it is lowered instead
    keep_weight: float = 1.0  # weight of the loss that training keeps low
    break_cap: float = 0.0  # cap on the raised loss of one prediction, nats; 0: log of the vocabulary size
    candidates: int = 10  # units that have a mask weight, as a multiple of max_masked
    choose_size: int = 50  # texts of each task by which candidates are chosen
    relax_steps: int = 100  # steps with weights in [0, 1]
    anneal_steps: int = 100  # steps with binary masks
    batch_size: int = 10  # texts of each task in a step
    lr: float = 0.05  # learning rate of Adam, on weights in [0, 1] (clamped) or on log odds (hard-concrete)
    penalty: float = 0.002  # penalty for masking the whole budget, at the end of the relax phase, nats


@dataclass
class LossSettings:
    """Settings of the losses of fine-tuning methods (`training.baselines`)."""

    TITLE: ClassVar[str] = "fine-tuning"

    ratio: float = 0.2  # joint: weight of the toxic loss (paper: eq. 4), as alpha is for masks
    cap: float = 0.0  # joint and ascent: cap on the loss of one toxic prediction, nats; 0: log of the vocabulary size
    npo_beta: float = 0.1  # npo: inverse temperature (Zhang et al.: 0.1)
    npo_retain: float = 1.0  # npo: weight of the ordinary loss
    rmu_layer: int = -1  # rmu: layer whose output is steered, from 0; -1: the one at half the depth
    rmu_steer: float = 5.0  # rmu: length of the target, in mean lengths of the activations
    rmu_retain: float = 100.0  # rmu: weight of leaving ordinary activations as they were
    lora_rank: int = 16  # lora_npo and rerouting: rank of the adapters
    rerouting_layers: tuple[int, ...] = ()  # layers, from 1, after which toxic text is rerouted; none: two of all


@dataclass
class FinetuneSettings(LossSettings):
    """How a model is fine-tuned. A step sees `batch_size` texts of each kind."""

    TITLE: ClassVar[str] = "fine-tuning"

    steps: int = 200  # most steps of a method
    lr: float = 1e-4  # learning rate of AdamW (no weight decay)
    warmup: int = 10  # steps over which the learning rate rises
    clip: float = 1.0  # largest norm of the gradient
    batch_size: int = 10  # texts of each kind in a step
    check_every: int = 10  # steps between validations
    patience: int = 5  # validations without a better score after which training stops
    alpha: float = 0.2  # weight of the toxic loss in the validation score; the mask's alpha
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # task_arithmetic, steering: multiples to subtract
    seed: int = 0  # of the order of texts


@dataclass
class PruneSettings:
    """How a model is pruned to the few edges that are enough for a behaviour."""

    rounds: int = 20  # rounds of a stage, each with one gradient
    shrink: float = 0.8  # edges kept after a stage, as a share of those kept before it
    memory: float = 0.9  # weight of older gradients in the running mean of an edge's worth
    batch_size: int = 20  # examples of a round
    fewest: int = 1  # number of edges at which pruning ends


@dataclass
class RelearnSettings:
    """How a model is fine-tuned on a behaviour that was removed."""

    TITLE: ClassVar[str] = "relearning"

    checks: tuple[int, ...] = (0, 2, 5, 10, 20, 40)  # steps after which toxicity is measured; the last ends training
    lr: float = 1e-4  # learning rate of AdamW (no weight decay), the same for every model
    lora_lr: float = 1e-3  # the same for low-rank adapters
    lora_rank: int = 16  # rank of the adapters; 0: relearning by adapters is not measured
    batch_size: int = 10  # examples in a step
    clip: float = 1.0  # largest norm of the gradient


def keeps_predictions(config: MaskConfig) -> bool:
    """Whether the loss to keep low is the divergence from the original model's predictions.

    The task's own loss takes its place where the divergence says nothing: if its weight is not positive, and for EAP,
    which differentiates at the whole model, where the divergence is 0 and so is its gradient.
    """
    at_whole_model = config.method == "attribution" and config.ig_steps == 0
    return config.keep_loss == "kl" and config.keep_weight > 0 and not at_whole_model


def check_mask(config: MaskConfig, n_edges: int | None = None, n_allowed: int | None = None) -> None:
    """Raise a `UserError` for settings that make no sense.

    Args:
        config: the settings.
        n_edges: edges of the model; None if it is not known yet.
        n_allowed: edges that may be cut; None if all may be.
    """
    if n_edges is not None and not 0 <= config.max_edges <= n_edges:
        raise UserError(f"max_edges {config.max_edges} is not between 0 and the model's {n_edges:,} edges.")
    if config.method != GIVEN:
        check_choice("method", config.method, METHODS)
    if config.method == GIVEN and config.max_edges and (n_allowed is None or n_allowed > config.max_edges):
        raise UserError(
            f"method {GIVEN} cuts all edges that may be cut. Give `allowed`, with at most max_edges of them, in code; "
            "scripts that find edges take another method."
        )
    check_not_negative(
        config, "max_edges", "steps", "refine_rounds", "constants_steps", "ig_steps", "micro_batch", "edge_penalty",
        "constants_lr",
    )  # fmt: skip
    check_positive(config, "batch_size", "refine_batch_size", "lr")
    if config.budgets and min(config.budgets) < 1:
        raise UserError(f"budgets are {list(config.budgets)}; each must be 1 or more.")
    check_choice("keep_loss", config.keep_loss, ("kl", "loss"))
    check_choice("constants_loss", config.constants_loss, ("keep", "objective"))
    if config.constants_lr and config.constants_loss == "keep" and config.keep_weight <= 0:
        raise UserError(
            f"ablation constants cannot be learned for a loss of weight {config.keep_weight}. Set constants_loss to "
            "objective, constants_lr to 0, or keep_weight above 0."
        )
    if config.method == "attribution" and config.ig_steps > config.steps:
        raise UserError(
            f"ig_steps {config.ig_steps} are more than the {config.steps} steps, of which each takes one gradient. "
            "Give more steps, or fewer points."
        )


def check_weight_mask(settings: WeightMaskSettings) -> None:
    """Raise a `UserError` for settings that make no sense."""
    check_choice("granularity", settings.granularity, WEIGHT_BUDGETS)
    check_choice("method", settings.method, WEIGHT_METHODS)
    check_not_negative(settings, "relax_steps", "anneal_steps", "penalty")
    check_positive(settings, "batch_size", "choose_size", "lr", "candidates")


def weight_budget(settings: WeightMaskSettings, n_units: int) -> int:
    """Most units to mask in a model that has `n_units`. Raises a `UserError` if it has fewer than were asked for."""
    budget = settings.max_masked
    if budget is None:
        budget = round(WEIGHT_BUDGETS[settings.granularity] * n_units)
    if not 0 <= budget <= n_units:
        raise UserError(f"max_masked {budget} is not between 0 and the model's {n_units:,} {settings.granularity}s.")
    return budget


def check_finetune(settings: FinetuneSettings) -> None:
    """Raise a `UserError` for settings that make no sense."""
    check_positive(settings, "steps", "lr", "batch_size", "check_every", "patience", "clip", "npo_beta", "lora_rank")
    if not settings.scales:
        raise UserError("scales is empty; give at least one for task_arithmetic and steering.")


def check_prune(settings: PruneSettings) -> None:
    """Raise a `UserError` for settings that make no sense."""
    for name, right in (
        ("rounds", settings.rounds >= 1),
        ("shrink", 0 < settings.shrink < 1),
        ("memory", 0 <= settings.memory < 1),
        ("batch_size", settings.batch_size >= 1),
        ("fewest", settings.fewest >= 1),
    ):
        if not right:
            raise UserError(f"{name} is {getattr(settings, name)}, with which edges cannot be pruned.")


def check_relearn(settings: RelearnSettings) -> None:
    """Raise a `UserError` for settings that make no sense."""
    if not settings.checks or min(settings.checks) < 0:
        raise UserError(f"checks are {list(settings.checks)}; give one or more steps, each 0 or more.")
    check_positive(settings, "lr", "lora_lr", "batch_size", "clip")
    check_not_negative(settings, "lora_rank")
