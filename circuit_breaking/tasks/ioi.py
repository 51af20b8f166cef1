"""Indirect-object identification (Wang et al. 2022): which of two names comes next."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.models.shipped import TEXT
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.files import is_text, read_jsonl
from circuit_breaking.tasks.data import PROMPTS_HINT
from circuit_breaking.tasks.prompts import Example, Objective, PromptBatch, PromptTask, encode_examples


@dataclass(frozen=True)
class Prompt:
    """A prompt, its indirect object (the right answer) and its subject (the wrong answer)."""

    text: str
    io: str
    subject: str

    def example(self) -> Example:
        """The prompt with its answers. In its counterfactual, the second mention of the subject names the other person.

        MIB calls this counterfactual `s2_io_flip`. A prompt that mentions the subject once has none.
        """
        mentions = list(re.finditer(rf"\b{re.escape(self.subject)}\b", self.text))
        other = None
        if len(mentions) > 1:
            other = self.text[: mentions[-1].start()] + self.io + self.text[mentions[-1].end() :]
        return Example(self.text, (f" {self.io}",), (f" {self.subject}",), other)


def read_prompts(path: Path | str) -> list[Prompt]:
    """Prompts of a JSON Lines file: in each row `IO`, `S` and the `prompt`, or a `text`.

    A `text` is the prompt, or the prompt followed by a space and the indirect object, as in the data of Wang et al.
    (2022).

    Raises:
        UserError: the file is missing, empty or damaged, a row lacks one of these, or its prompt already holds the
            answer, ends in white space, lacks a name or has one name for both.
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
    """What makes a prompt useless for this task: it lacks a name, or none can follow its last word."""
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
        if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", prompt.text):
            return f"the prompt does not mention {name!r}"
    return None


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], prefix: int) -> PromptBatch:
    """Tokenise prompts, each after the prefix token, and the names that may follow.

    Raises:
        UserError: a name is not a single token after its prompt.
    """
    try:
        return encode_examples(tokenizer, [prompt.example() for prompt in prompts], prefix)
    except UserError as error:
        raise UserError(f"{error} Make prompts for this tokenizer with ioi/make_ioi_datasets.py.") from None


class IOITask(PromptTask):
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
        tokenizer: PreTrainedTokenizerBase,
        train: Path | str | Sequence[Prompt] = TEXT / "ioi_train.jsonl",
        test: Path | str | Sequence[Prompt] = TEXT / "ioi_test.jsonl",
        examples: int | None = None,
        seed: int = 0,
        objective: Objective = "cross_entropy",
    ) -> None:
        found = [read_prompts(source) if isinstance(source, str | Path) else list(source) for source in (train, test)]
        if both := {prompt.text for prompt in found[0]} & {prompt.text for prompt in found[1]}:
            raise UserError(f"prompts that are both in the training and the held-out data: {len(both)}. {PROMPTS_HINT}")
        found[0] = found[0][:examples]
        if not all(found):
            raise UserError(f"there are no {'held-out' if found[0] else 'training'} prompts. {PROMPTS_HINT}")
        prefix = prefix_token(tokenizer)
        train_batch, test_batch = (encode_prompts(tokenizer, prompts, prefix) for prompts in found)
        super().__init__("IOI", train_batch, test_batch, seed, objective)
