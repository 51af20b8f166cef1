"""A steering vector: contrastive activation addition (Rimsky et al. 2024, arXiv:2312.06681).

    h ← h - scale · v after layer l,    v = mean h(toxic) - mean h(ordinary)

h is the residual stream after layer l; the means are over the predictions of the training texts. Layer and scale are
chosen on validation texts. Subtracting a vector after a layer is the same as adding it to the bias of that layer's MLP,
so the result is a stock model. It acts at every position, those of the prompt included. Llama and Granite have an
option that gives MLPs biases, which is turned on; for families without one, and where a norm comes after the MLP,
steering is refused.

Shapes: D width, L layers.
"""

from torch import nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.training.baselines.base import Candidate, Edit, Weights
from circuit_breaking.training.baselines.streams import mean_streams
from circuit_breaking.training.config import LossSettings

OPTION = "mlp_bias"  # of a configuration, which gives all linear modules of the MLPs a bias


def prepare(model: nn.Module) -> None:
    """Give the MLPs of `model` biases of zero, if they have none. Raises a `UserError` if its family allows none."""
    layers = describe(model).layers
    needs_bias = any(layer.down.bias is None for layer in layers)
    if any(layer.mlp_out_norm for layer in layers) or (needs_bias and not hasattr(model.config, OPTION)):
        raise UserError(
            f"a steering vector is saved as a bias of an MLP, and a {model.config.model_type} model can have none "
            "there. Leave steering out of methods."
        )
    if not needs_bias:
        return
    setattr(model.config, OPTION, True)
    for layer in layers:
        for module in (layer.gate.module, layer.up.module, layer.down.module):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features), requires_grad=False)


def candidates(model: nn.Module, settings: LossSettings) -> list[Candidate]:
    """Every layer but the last, with every scale."""
    layers = range(model.config.num_hidden_layers - 1)
    return [{"layer": layer, "scale": scale} for layer in layers for scale in settings.scales]


def differences(model: nn.Module, toxic: TextTask, ordinary: TextTask) -> Weights:
    """The difference v of the mean streams of toxic and ordinary training texts, after every layer but the last:
    [L - 1, D]. As many texts of each kind are used."""
    count = min(len(toxic.train), len(ordinary.train))
    means = [mean_streams(model, task.train[:count]) for task in (toxic, ordinary)]
    return {"difference": means[0] - means[1]}


def weights(model: nn.Module, measured: Weights, candidate: Candidate) -> Weights:
    """The bias of one MLP, with which the vector is subtracted after its layer."""
    layer = describe(model).layers[candidate["layer"]]
    vector = candidate["scale"] * measured["difference"][candidate["layer"]] / layer.multiplier
    name = next(name for name, one in model.named_parameters() if one is layer.down.module.bias)
    return {name: layer.down.module.bias.detach() - vector.to(layer.down.module.bias)}


STEERING = Edit(
    "a vector subtracted from the residual stream after one layer", prepare, candidates, differences, weights
)
