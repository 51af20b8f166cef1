"""How a mask is trained."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class MaskSettings:
    """How a mask is trained. Losses are in nats; a step sees `batch_size` texts of each task."""

    method: Literal["clamped", "hard-concrete", "attribution", "given"] = "clamped"  # how edges are found at first
    max_edges: int = 12  # most edges that the mask may cut: a promise
    alpha: float = 0.2  # weight of the loss to raise (paper: 0.2); negative to lower it too
    keep_weight: float = 1.0  # weight of the loss to keep low; 0 finds edges that the behaviour needs
    break_cap: float = 0.0  # most that one prediction counts towards the broken loss; 0: log of the vocabulary
    relax_steps: int = 100  # steps with weights in [0, 1], as in the paper
    anneal_steps: int = 100  # steps in which the number of cut edges falls to the budget; attribution takes both alike
    refine_rounds: int = 60  # rounds of single changes by measured effect
    batch_size: int = 5  # texts of each task a step
    refine_batch_size: int = 20  # texts of each task a round of refinement
    micro_batch: int = 0  # texts computed at a time, gradients added up: less memory, same result; 0: a batch at once
    recompute: bool = False  # compute parts of each layer again in the backward: less memory, more time
    tries: int = 8  # most masks measured in a round of refinement
    lr: float = 0.05  # AdamW without decay, on weights in [0, 1]
    sparsity: float = 0.0005  # price of a cut edge in the relax phase, after its ramp, nats
    refine_price: float = 0.0  # what a change must win for each edge that it cuts, nats
    ramp: float = 0.1  # share of the relax phase over which the price rises from 0
    round_every: int = 50  # steps between roundings in the relax phase; 0: never
    candidates: float = 3.0  # edges cut when annealing starts, over the budget; below 1: no more, and new cuts measured
    chance: float = 0.5  # hard-concrete: of each edge to be cut at all, be it in part, before anything is learned
    ig_steps: int = 0  # points where attribution takes gradients, from all edges cut on (EAP-IG); 0: all kept (EAP)
    means_lr: float = 0.0  # AdamW's, on what cut edges carry, learned with the mask (optimal ablation); 0: it stays
    means_steps: int = 100  # where it is learned, steps at the end in which only this is
    means_goal: Literal["keep", "objective"] = "keep"  # what it is learned for: the loss to keep low, or all of this
