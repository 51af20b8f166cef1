"""Tasks of prompts: after the last token of a prompt, one of its right answers should come, and none of its wrong ones.

An answer is a single token. A prompt may have a counterfactual: another prompt of the same number of tokens, after
which a wrong answer would be right.

Shapes: n prompts, B batch, T positions, V vocabulary, A answers of the prompt that has most.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.models.causal_model import CausalModel
from circuit_breaking.models.tokens import TokenBatch, pad_right
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.losses import logit_difference

Objective = Literal["cross_entropy", "logit_difference"]


@dataclass(frozen=True)
class Example:
    """A prompt and its answers.

    Attributes:
        text: the prompt.
        right, wrong: what may follow, each a single token after the prompt, with its space if it has one: `" Mary"`.
        counterfactual: a prompt of the same number of tokens after which a wrong answer is right; None if unknown.
    """

    text: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    counterfactual: str | None = None


@dataclass(frozen=True)
class PromptBatch(TokenBatch):
    """Tokens of prompts, padded on the right.

    Attributes:
        right, wrong: answers of each prompt, int64 [n, A]. A prompt with fewer answers has -1 in the last columns.
        counterfactual: tokens of the counterfactual prompts, int64 [n, T], of the same lengths; None if some prompt
            has none.
    """

    right: Tensor | None = None
    wrong: Tensor | None = None
    counterfactual: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "PromptBatch":
        """The prompts of some rows, with padding to the longest of them."""
        lengths = self.lengths[rows]
        longest = int(lengths.max())
        other = None if self.counterfactual is None else self.counterfactual[rows][:, :longest]
        return PromptBatch(
            self.tokens[rows][:, :longest], lengths, None, self.right[rows], self.wrong[rows], other
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same prompts on another device."""
        tokens, lengths, right, wrong = (
            tensor.to(device) for tensor in (self.tokens, self.lengths, self.right, self.wrong)
        )
        other = None if self.counterfactual is None else self.counterfactual.to(device)
        return PromptBatch(tokens, lengths, None, right, wrong, other)

    def counterfactuals(self) -> TokenBatch:
        """The counterfactual prompts as texts. Raises a `UserError` if some prompt has none."""
        if self.counterfactual is None:
            raise UserError(
                "some prompts have no counterfactual of the same number of tokens. Use another task, or zero or means "
                "as ablation values."
            )
        return TokenBatch(self.counterfactual, self.lengths)


@dataclass(frozen=True)
class EncodedExample:
    """Tokens of a prompt and its answers, without the prefix token.

    Attributes:
        tokens, right, wrong: of the prompt, and its answers.
        counterfactual: tokens of the counterfactual; None if there is none, or if it has another number of tokens.
        problem: why the example cannot be used; None if it can.
    """

    tokens: list[int]
    right: list[int]
    wrong: list[int]
    counterfactual: list[int] | None
    problem: str | None


def encode_each(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[EncodedExample]:
    """Tokenise prompts and their answers. An example with an answer that is not a single token has a `problem`."""
    rows = tokens_of(tokenizer, [example.text for example in examples])
    others = iter(tokens_of(tokenizer, [each.counterfactual for each in examples if each.counterfactual is not None]))
    answers = [example.text + answer for example in examples for answer in (*example.right, *example.wrong)]
    longer = iter(tokens_of(tokenizer, answers))
    found = []
    for example, row in zip(examples, rows, strict=True):
        other = None if example.counterfactual is None else next(others)
        last, problem = [], None
        for answer in (*example.right, *example.wrong):
            tokens = next(longer)
            if tokens[:-1] != row:
                problem = f"the answer {answer!r} is {len(tokens) - len(row)} tokens after {example.text!r} and not one"
            last.append(tokens[-1])
        split = len(example.right)
        other = other if other is not None and len(other) == len(row) else None
        found.append(EncodedExample(row, last[:split], last[split:], other, problem))
    return found


def batch_of(examples: Sequence[EncodedExample], prefix: int) -> PromptBatch:
    """Tokenised prompts as a batch, each after the prefix token."""
    batch = pad_right([[prefix, *example.tokens] for example in examples], prefix)
    answers = {}
    for key in ("right", "wrong"):
        rows = [getattr(example, key) for example in examples]
        most = max(map(len, rows))
        answers[key] = torch.tensor([row + [-1] * (most - len(row)) for row in rows])
    other = None
    if all(example.counterfactual is not None for example in examples):
        other = pad_right([[prefix, *example.counterfactual] for example in examples], prefix).tokens
    return PromptBatch(batch.tokens, batch.lengths, counterfactual=other, **answers)


def encode_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], prefix: int) -> PromptBatch:
    """Tokenise prompts, each after the prefix token, and their answers.

    Raises:
        UserError: an answer is not a single token after its prompt.
    """
    encoded = encode_each(tokenizer, examples)
    if problem := next((example.problem for example in encoded if example.problem), None):
        raise UserError(f"{problem}. Use words that are single tokens of this tokenizer.")
    return batch_of(encoded, prefix)


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []


class PromptTask(TextTask):
    """Answering prompts.

    Args:
        name: what the task is called in messages.
        train, test: prompts (`encode_examples`).
        seed: of the order of training prompts.
        objective: the definition of `loss`: "cross_entropy" of the right answers, or minus the "logit_difference"
            between right and wrong ones.
    """

    def __init__(
        self, name: str, train: PromptBatch, test: PromptBatch, seed: int = 0, objective: Objective = "cross_entropy"
    ) -> None:
        super().__init__(name, train, test, seed)
        self.objective = objective

    def loss(
        self, model: CausalModel, batch: PromptBatch, mask: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Mean loss after the last tokens of the prompts of a batch; see `Task`."""
        logits, batch = end_logits(model, batch, mask)
        if self.objective == "cross_entropy":
            losses = answer_loss(logits.float(), batch.right)
        else:
            losses = -answer_difference(logits.float(), batch)
        return (losses if cap is None else losses.clamp(max=cap)).mean()

    def divergence(self, model: EdgeMaskedTransformer, batch: PromptBatch, mask: Tensor) -> Tensor:
        """Mean KL(original || ablated) of the predictions after the last tokens of the prompts; see `Task`."""
        with torch.no_grad():
            original = F.log_softmax(end_logits(model, batch, torch.ones_like(mask))[0].float(), -1)
        ablated = F.log_softmax(end_logits(model, batch, mask)[0].float(), -1)
        return F.kl_div(ablated, original, reduction="batchmean", log_target=True)

    def predictions(self, batch: PromptBatch) -> int:
        """One per prompt."""
        return len(batch)

    @torch.no_grad()
    def measure(self, model: CausalModel, num_data: int | None = None) -> dict[str, Tensor]:
        """Measure the prediction after each held-out prompt, float64 [n] each.

        Returns:
            `loss` (cross entropy of the right answers, nats), `logit_difference` (`answer_difference`), `accuracy` (1
            where the most probable token is a right answer), `above_subject` (1 where the right answers are together
            more probable than the wrong ones; the wrong one is the subject in indirect-object prompts) and
            `probability` (of the right answers together).
        """
        found: dict[str, list[Tensor]] = {}
        for test_batch in self._test_batches(num_data):
            logits, batch = end_logits(model, test_batch)
            logits = logits.double()
            loss = answer_loss(logits, batch.right)
            difference = answer_difference(logits, batch)
            rows = {
                "loss": loss,
                "logit_difference": difference,
                "accuracy": (logits.argmax(-1, keepdim=True) == batch.right).any(1),
                "above_subject": difference > 0,
                "probability": (-loss).exp(),
            }
            for key, values in rows.items():
                found.setdefault(key, []).append(values.double().cpu())
        return {key: torch.cat(values) for key, values in found.items()}

    def get_test_loss(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean cross entropy of the right answers, or minus the mean logit difference, over held-out prompts."""
        measured = self.measure(model, num_data)
        mean = (measured["loss"] if self.objective == "cross_entropy" else -measured["logit_difference"]).mean()
        return float(mean)

    def get_test_accuracy(self, model: CausalModel, num_data: int | None = None) -> float:
        """Share of held-out prompts after which the most probable token is a right answer."""
        return float(self.measure(model, num_data)["accuracy"].mean())

    def get_test_logit_difference(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean logit difference between right and wrong answers, over held-out prompts."""
        return float(self.measure(model, num_data)["logit_difference"].mean())

    def get_test_probability(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean probability of the right answers, over held-out prompts."""
        return float(self.measure(model, num_data)["probability"].mean())


def end_logits(model: CausalModel, batch: PromptBatch, mask: Tensor | None = None) -> tuple[Tensor, PromptBatch]:
    """Logits [B, V] after the last token of each prompt, and the batch on the model's device.

    Cut edges carry outputs on the counterfactual prompts if `model.resample`. Raises a `UserError` if there are none.
    """
    batch = batch.to(model.device)
    with model.resampling(batch.counterfactuals().tokens) if model.resample else nullcontext():
        return model(batch.tokens, at=batch.lengths - 1, mask=mask), batch


def answer_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Minus the log of the probability of some answers together: logits [B, V], answers int64 [B, A] -> [B], nats."""
    if answers.shape[1] == 1:
        return F.cross_entropy(logits, answers[:, 0], reduction="none")
    return logits.logsumexp(-1) - answer_logit(logits, answers)


def answer_difference(logits: Tensor, batch: PromptBatch) -> Tensor:
    """Logit of the right answers minus that of the wrong ones: logits [B, V] -> [B].

    For several answers it is the log of the ratio of their probabilities, which for two single answers is the
    difference of their logits.
    """
    if batch.right.shape[1] == batch.wrong.shape[1] == 1:
        return logit_difference(logits, batch.right[:, 0], batch.wrong[:, 0])
    return answer_logit(logits, batch.right) - answer_logit(logits, batch.wrong)


def answer_logit(logits: Tensor, answers: Tensor) -> Tensor:
    """Log of the sum of exp(logit) over the answers of each prompt: logits [B, V], answers int64 [B, A] -> [B]."""
    chosen = logits.gather(1, answers.clamp(min=0))
    return chosen.masked_fill(answers < 0, float("-inf")).logsumexp(-1)
