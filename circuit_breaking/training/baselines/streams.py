"""The residual stream between the layers of a stock model.

Shapes: n texts, T tokens, D width, L layers.
"""

import torch
from torch import Tensor, nn

from circuit_breaking.models.tokens import TokenBatch


def after_layers(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, ...]:
    """The residual stream before the first layer and after every layer: L + 1 tensors [n, T, D].

    The last one comes after the final norm, as Hugging Face gives it. The texts are on the model's device.
    """
    return model.base_model(input_ids=batch.tokens, use_cache=False, output_hidden_states=True).hidden_states


@torch.no_grad()
def mean_streams(model: nn.Module, texts: TokenBatch, batch_size: int = 32) -> Tensor:
    """The mean of the residual stream after every layer but the last, over the predictions of texts: [L - 1, D].

    The first position is left out. It is the same token in every text, and often an attention sink whose activations
    are so large that texts of other lengths would differ by them alone.
    """
    total, count = 0.0, 0
    for batch in texts.batches(batch_size):
        batch = batch.to(model.device)
        where = batch.predicted.clone()
        where[:, 0] = False
        streams = torch.stack(after_layers(model, batch)[1:-1])
        total = total + streams[:, where].double().sum(1)
        count += int(where.sum())
    return total / count
