"""Representation rerouting, "circuit breakers" (Zou et al. 2024, arXiv:2406.04313).

    c_s(t) · mean ReLU(cos(h(toxic), h_original(toxic))) + c_r(t) · mean |h(ordinary) - h_original(ordinary)|₂

Low-rank adapters turn the residual stream of toxic text away from where it was, at a few layers, until it is orthogonal
to it. On ordinary text, the stream before the first layer and after every layer stays where it was. As the authors run
it, the coefficients change linearly over T steps: c_s = α (1 - t/2T) and c_r = α t/2T. With 32 layers they take the
stream after layers 10 and 20 (counted from 1), adapt all linear modules up to layer 21 with rank 16, and train 150
steps with AdamW at 1e-4 and α = 10 (Llama 3) or 5 (Mistral). Other depths take the same shares of the layers.

The cosine similarity of a vector with itself is at its maximum, so the loss has no gradient at the original model. The
rounding errors of bfloat16 are enough of a start for the authors; in float32 nothing happens. Here the adapters' output
factors start at random, with a small spread. Dropout of the adapters (theirs: 0.05) is left out, as for all methods
here.

Shapes: M predictions, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.training.baselines.base import ADAPTERS, Method, State
from circuit_breaking.training.baselines.lora import linear_weights
from circuit_breaking.training.baselines.streams import after_layers
from circuit_breaking.training.config import LossSettings

ALPHA = 10.0
SPREAD = 0.02  # of the adapters' initial output factors
SHARES = (10 / 32, 20 / 32)  # of the layers, after which the stream is rerouted


def rerouting(state: State, toxic: TokenBatch, ordinary: TokenBatch) -> Tensor:
    """c_s · mean ReLU(cosine similarity of toxic streams) + c_r · mean distance of ordinary streams."""
    layers = rerouted_layers(state.model, state.settings)
    with torch.no_grad():
        toxic_before, ordinary_before = streams(state.original, toxic), streams(state.original, ordinary)
    turned = F.cosine_similarity(streams(state.model, toxic)[layers], toxic_before[layers], dim=-1).relu().mean()
    moved = torch.linalg.vector_norm(streams(state.model, ordinary) - ordinary_before, dim=-1).mean()
    done = state.progress / 2
    return ALPHA * ((1 - done) * turned + done * moved)


def streams(model: nn.Module, batch: TokenBatch) -> Tensor:
    """The residual stream before the first layer and after every layer, at the positions of predictions: [·, M, D]."""
    batch = batch.to(model.device)
    where = batch.predicted
    return torch.stack([stream[where] for stream in after_layers(model, batch)])


def rerouted_layers(model: nn.Module, settings: LossSettings) -> list[int]:
    """The layers, counted from 1, after which toxic streams are rerouted.

    Raises:
        UserError: the model has no such layers.
    """
    n_layers = model.config.num_hidden_layers
    layers = sorted(set(settings.rerouting_layers or (max(1, round(share * n_layers)) for share in SHARES)))
    # the last of Hugging Face's hidden states comes after the final norm, so the last layer is excluded
    if not 1 <= layers[0] <= layers[-1] < n_layers:
        raise UserError(
            f"rerouting_layers are {', '.join(map(str, layers))}; the model has {n_layers} layers, and each must be "
            "at least 1 and below that number."
        )
    return layers


def adapted(model: nn.Module, settings: LossSettings) -> list[str]:
    """All linear modules up to the one layer after the last rerouted stream."""
    return linear_weights(model, max(rerouted_layers(model, settings)) + 1)


REROUTING = Method(
    "representation rerouting: toxic streams turned away, ordinary ones kept, by low-rank adapters", rerouting,
    compares=True, adapts=adapted, spread=SPREAD, lrs=ADAPTERS,
)  # fmt: skip
