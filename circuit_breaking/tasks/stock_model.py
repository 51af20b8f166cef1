"""A stock Hugging Face model as a `CausalModel`, the interface that tasks use."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuit_breaking.engine.output import select_positions
from circuit_breaking.models.families import head_of


class StockModel:
    """A stock Hugging Face model as a `CausalModel`.

    The model may be of any family. Its logits are always those of its own forward pass, which scales or caps them in
    some families.

    Attributes:
        resample: whether cut edges of a task's prompts carry outputs on their counterfactuals (`resampling`).

    Differentiable in the weights that require a gradient, except for those of the output embedding in losses that use
    `unembedding` as a constant (`tasks.losses.prediction_losses`).
    """

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        self.head = head_of(hf)
        self.plain_head = self.head is not None and self.head.is_plain
        self.unembedding = hf.get_output_embeddings().weight
        self.unembedding_bias = getattr(hf.get_output_embeddings(), "bias", None)
        self.resample = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.hf.device

    def resampling(self, counterfactual: Tensor) -> AbstractContextManager[None]:
        """As `ablation.ablate.Ablation.resampling`, if edges of the model are cut; nothing changes in a whole model."""
        cuts = getattr(self.hf, "edge_cuts", None)
        return nullcontext() if cuts is None else cuts.resampling(counterfactual)

    def hidden(self, tokens: Tensor, at: Tensor | None = None, mask: None = None) -> Tensor:
        """Last hidden state, as `EdgeMaskedTransformer.hidden`; there are no edges to mask."""
        hidden = self.hf.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden if at is None else select_positions(hidden, at)

    def __call__(self, tokens: Tensor, at: Tensor | None = None, mask: None = None) -> Tensor:
        """Next-token logits, as `EdgeMaskedTransformer.forward`."""
        if not self.plain_head:
            logits = self.hf(input_ids=tokens, use_cache=False).logits
            return logits if at is None else select_positions(logits, at)
        return F.linear(self.hidden(tokens, at), self.unembedding, self.unembedding_bias)
