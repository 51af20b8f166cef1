"""Indirect-object identification (Wang et al. 2022): which of two names comes next.

Shapes: n prompts, B batch, T position, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.models.causal_model import CausalModel
from circuit_breaking.models.shipped import TEXT
from circuit_breaking.models.tokens import TokenBatch, pad_right, prefix_token
from circuit_breaking.runs.files import is_text, read_jsonl
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.data import PROMPTS_HINT
from circuit_breaking.tasks.losses import logit_difference

Objective = Literal["cross_entropy", "logit_difference"]


@dataclass(frozen=True)
class Prompt:
    """A prompt, its indirect object (the right answer) and its subject (the wrong answer)."""

    text: str
    io: str
    subject: str


@dataclass(frozen=True)
class PromptBatch(TokenBatch):
    """Tokens of prompts, padded on the right.

    Attributes:
        io, subject: tokens of the two names that may follow, int64 [n].
    """

    io: Tensor | None = None
    subject: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "PromptBatch":
        """The prompts of some rows, with padding to the longest of them."""
        lengths = self.lengths[rows]
        return PromptBatch(
            self.tokens[rows][:, : int(lengths.max())], lengths, io=self.io[rows], subject=self.subject[rows]
        )

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same prompts on another device."""
        tensors = (self.tokens, self.lengths, self.io, self.subject)
        tokens, lengths, io, subject = (tensor.to(device) for tensor in tensors)
        return PromptBatch(tokens, lengths, io=io, subject=subject)


def read_prompts(path: Path | str) -> list[Prompt]:
    """Prompts of a JSON Lines file: in each row `IO`, `S` and the `prompt`, or a `text`.

    A `text` is the prompt, or the prompt followed by a space and the indirect object, as in the data of Wang et al.
    (2022).

    Raises:
        UserError: the file is missing, empty or damaged, a row lacks one of these, or its prompt already holds the
            answer, ends in white space or has one name for both.
    """
    prompts = []
    for number, row in enumerate(read_jsonl(path, PROMPTS_HINT), 1):
        found = [row.get("prompt", row.get("text")), row.get("IO"), row.get("S")] if isinstance(row, dict) else [None]
        if not all(is_text(value) and value for value in found):
            raise UserError(f"{path}, row {number}: there is no 'text', 'IO' and 'S' with text in each. {PROMPTS_HINT}")
        prompt = Prompt(*found)
        if "prompt" not in row:
            prompt = replace(prompt, text=prompt.text.removesuffix(f" {prompt.io}"))
        if problem := _problem(prompt):
            raise UserError(f"{path}, row {number}: {problem}. {PROMPTS_HINT}")
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no rows. {PROMPTS_HINT}")
    return prompts


def _problem(prompt: Prompt) -> str | None:
    """What makes a prompt useless for this task: the name that is to be predicted does not follow its last word."""
    names = (prompt.io, prompt.subject)
    if any(name != name.strip() for name in names):
        return f"the names {prompt.io!r} and {prompt.subject!r} must not begin or end with white space"
    if prompt.io == prompt.subject:
        return f"IO and S are the same name, {prompt.io!r}"
    if prompt.text != prompt.text.rstrip():
        return "the prompt ends in white space, but the name after it begins with a space"
    if not prompt.text:
        return "the prompt is empty"
    for name in names:
        if re.search(rf"(?<!\w){re.escape(name)}\W*\Z", prompt.text):
            return f"the prompt already ends with {name!r}, but a name is to follow it"
    return None


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], prefix: int) -> PromptBatch:
    """Tokenise prompts, each after the prefix token, and the names that may follow.

    Raises:
        UserError: a name is not a single token after its prompt.
    """

    def encoded(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    rows = encoded([prompt.text for prompt in prompts])
    answers = {}
    for key in ("io", "subject"):
        names = [getattr(prompt, key) for prompt in prompts]
        with_name = encoded([f"{prompt.text} {name}" for prompt, name in zip(prompts, names, strict=True)])
        for prompt, name, row, longer in zip(prompts, names, rows, with_name, strict=True):
            if longer[:-1] != row:
                raise UserError(
                    f"the name {name!r} is {len(longer) - len(row)} tokens behind {prompt.text!r} and not one. "
                    "Make prompts for this tokenizer with ioi/make_ioi_datasets.py."
                )
        answers[key] = torch.tensor([row[-1] for row in with_name])
    batch = pad_right([[prefix, *row] for row in rows], prefix)
    return PromptBatch(batch.tokens, batch.lengths, **answers)


class IOITask(TextTask):
    """Naming the indirect object: the prediction after the last token of each prompt.

    Args:
        tokenizer: the model's tokenizer.
        train, test: JSON Lines of prompts (see `read_prompts`), or prompts; the shipped ones by default.
        examples: number of training prompts to use, from the beginning of the file; None: all.
        seed: of the order of training prompts.
        objective: the definition of `loss`: "cross_entropy" of the indirect object, or minus the "logit_difference"
            between it and the subject.

    Raises:
        UserError: a file is missing or empty, a name is not one token, or a prompt is in both files.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: Path | str | Sequence[Prompt] = TEXT / "ioi_train.jsonl",
        test: Path | str | Sequence[Prompt] = TEXT / "ioi_test.jsonl",
        examples: int | None = None,
        seed: int = 0,
        objective: Objective = "cross_entropy",
    ) -> None:
        found = [read_prompts(source) if isinstance(source, str | Path) else list(source) for source in (train, test)]
        if both := {prompt.text for prompt in found[0]} & {prompt.text for prompt in found[1]}:
            raise UserError(f"{len(both)} prompts are both in the training and the held-out data. {PROMPTS_HINT}")
        found[0] = found[0][:examples]
        if not all(found):
            raise UserError(f"there are no {'held-out' if found[0] else 'training'} prompts. {PROMPTS_HINT}")
        prefix = prefix_token(tokenizer)
        super().__init__("IOI", *(encode_prompts(tokenizer, prompts, prefix) for prompts in found), seed)
        self.objective = objective

    def loss(
        self, model: CausalModel, batch: PromptBatch, mask: Tensor | None = None, cap: float | None = None
    ) -> Tensor:
        """Mean loss after the last tokens of the prompts of a batch; see `Task`."""
        logits, batch = end_logits(model, batch, mask)
        if self.objective == "cross_entropy":
            losses = F.cross_entropy(logits.float(), batch.io, reduction="none")
        else:
            losses = -logit_difference(logits.float(), batch.io, batch.subject)
        return (losses if cap is None else losses.clamp(max=cap)).mean()

    def predictions(self, batch: PromptBatch) -> int:
        """One per prompt."""
        return len(batch)

    @torch.no_grad()
    def measure(self, model: CausalModel, num_data: int | None = None) -> dict[str, Tensor]:
        """Measure the prediction after each held-out prompt, float64 [n] each.

        Returns:
            `loss` (cross entropy of the indirect object, nats), `logit_difference` (to the subject), `accuracy`
            (1 where the indirect object is the most probable token), `above_subject` (1 where it is more probable than
            the subject) and `probability` (of the indirect object).
        """
        found: dict[str, list[Tensor]] = {}
        for test_batch in self._test_batches(num_data):
            logits, batch = end_logits(model, test_batch)
            logits = logits.double()
            loss = F.cross_entropy(logits, batch.io, reduction="none")
            difference = logit_difference(logits, batch.io, batch.subject)
            rows = {
                "loss": loss,
                "logit_difference": difference,
                "accuracy": logits.argmax(-1) == batch.io,
                "above_subject": difference > 0,
                "probability": (-loss).exp(),
            }
            for key, values in rows.items():
                found.setdefault(key, []).append(values.double().cpu())
        return {key: torch.cat(values) for key, values in found.items()}

    def get_test_loss(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean cross entropy of the indirect object, or minus the mean logit difference, over held-out prompts."""
        measured = self.measure(model, num_data)
        mean = (measured["loss"] if self.objective == "cross_entropy" else -measured["logit_difference"]).mean()
        return float(mean)

    def get_test_accuracy(self, model: CausalModel, num_data: int | None = None) -> float:
        """Share of held-out prompts after which the indirect object is the most probable token."""
        return float(self.measure(model, num_data)["accuracy"].mean())

    def get_test_logit_difference(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean logit of the indirect object minus that of the subject, over held-out prompts."""
        return float(self.measure(model, num_data)["logit_difference"].mean())

    def get_test_probability(self, model: CausalModel, num_data: int | None = None) -> float:
        """Mean probability of the indirect object, over held-out prompts."""
        return float(self.measure(model, num_data)["probability"].mean())


def end_logits(model: CausalModel, batch: PromptBatch, mask: Tensor | None = None) -> tuple[Tensor, PromptBatch]:
    """Logits [B, V] after the last token of each prompt, and the batch on the model's device."""
    batch = batch.to(model.device)
    return model(batch.tokens, at=batch.lengths - 1, mask=mask), batch
