"""Directional ablation: one direction is removed from everything that is written to the residual stream (Arditi et al.
2024, arXiv:2406.11717).

    W ← W - W r rᵀ    for every matrix W [in, D] that writes, and likewise for every bias

r is the direction of the difference of mean streams of toxic and ordinary text after one layer (as for `steering`), of
length 1; the layer is chosen on validation texts. What writes is the embedding, learned positions, the output
projections of attention and of the MLPs. The result is the same as projecting r out of what each of them writes, and it
is a stock model. An output embedding that is tied to the input embedding is separated from it first and stays as it
was. Where a norm comes after attention or the MLP, no change of weights does the same, and the method is refused.

Shapes: D width.
"""

from torch import Tensor, nn

from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe
from circuit_breaking.models.families.spec import ModelSpec
from circuit_breaking.training.baselines.base import Candidate, Edit, Weights
from circuit_breaking.training.baselines.steering import differences
from circuit_breaking.training.config import LossSettings


def prepare(model: nn.Module) -> None:
    """Separate the output embedding of `model` from the input embedding. Raises a `UserError` where a norm comes after
    attention or the MLP."""
    layers = describe(model).layers
    if any(layer.attention_out_norm or layer.mlp_out_norm for layer in layers):
        raise UserError(
            f"a {model.config.model_type} model has norms after attention and MLP, so that a direction cannot be "
            "removed by changing weights. Leave direction out of methods."
        )
    output = model.get_output_embeddings()
    if output.weight is model.get_input_embeddings().weight:
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def candidates(model: nn.Module, settings: LossSettings) -> list[Candidate]:
    """Every layer but the last."""
    return [{"layer": layer} for layer in range(model.config.num_hidden_layers - 1)]


def weights(model: nn.Module, measured: Weights, candidate: Candidate) -> Weights:
    """Everything that writes to the stream, without the direction of a layer."""
    direction = measured["difference"][candidate["layer"]]
    direction = direction / direction.norm()
    writers = {id(parameter): view for parameter, view in writing(describe(model))}
    return {
        name: without(parameter.detach(), direction, by_row=writers[id(parameter)])
        for name, parameter in model.named_parameters()
        if id(parameter) in writers
    }


def writing(spec: ModelSpec) -> list[tuple[Tensor, bool]]:
    """The parameters that write to the stream, and whether they hold what they write in their rows: [..., D]."""
    found = [(spec.embedding, True), *([(spec.positions, True)] if spec.positions is not None else [])]
    for layer in spec.layers:
        for part in (layer.out, layer.down):
            found.append((part.module.weight, part.inputs_first(part.module.weight) is part.module.weight))
            if part.module.bias is not None:
                found.append((part.module.bias, True))
    return found


def without(parameter: Tensor, direction: Tensor, by_row: bool) -> Tensor:
    """A parameter [..., D] (or, not `by_row`, [D, in]) without the component along a direction [D] of length 1."""
    rows = (parameter if by_row else parameter.t()).double()
    rows = rows - (rows @ direction)[..., None] * direction
    return (rows if by_row else rows.t()).to(parameter.dtype)


DIRECTION = Edit(
    "one direction removed from everything that is written to the residual stream",
    prepare, candidates, differences, weights,
)  # fmt: skip
