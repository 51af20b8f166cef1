"""Texts to token batches (layer 0).

Shapes: n texts, T tokens of the longest (at most the context length).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """Texts as tokens, padded on the right.

    `tokens` int64 [n, T]; `lengths` int64 [n], prefix token included; `starts` int64 [n], the first token of each text
    whose prediction counts, or None for all but the prefix token.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> "TokenBatch":
        """The texts of some rows, cut to the longest of them."""
        lengths = self.lengths[rows]
        starts = None if self.starts is None else self.starts[rows]
        return TokenBatch(self.tokens[rows][:, : int(lengths.max())], lengths, starts)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same texts on another device."""
        starts = None if self.starts is None else self.starts.to(device)
        return TokenBatch(self.tokens.to(device), self.lengths.to(device), starts)

    @property
    def real(self) -> Tensor:
        """True where a token is no padding: bool [n, T]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def predicted(self) -> Tensor:
        """True where a token follows whose prediction counts: bool [n, T]."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        before_end = position < self.lengths[:, None] - 1
        return before_end if self.starts is None else before_end & (position >= self.starts[:, None] - 1)

    def batches(self, size: int) -> Iterator["TokenBatch"]:
        """Consecutive batches of at most `size` texts."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def encode(
    tokenizer: Any,
    texts: Sequence[str],
    prefix: int,
    length: int,
    end: bool = False,
    prompts: Sequence[str] | None = None,
) -> TokenBatch:
    """Tokenise texts, each behind the prefix token and cut to `length` tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts; those without a single token are left out.
        prefix: token that starts every text (see `models.prefix_token`).
        length: most tokens a text may have, prefix included; at least 2.
        end: put the prefix token behind a text that is not cut, so that its end is predicted too.
        prompts: the beginning of each text that is given, so that only what follows it counts as predicted; texts that
            are cut before it ends are left out.

    Raises:
        UserError: no text has a token, or `length` leaves nothing to predict.
    """
    if length < 2:
        raise UserError(f"a context of {length} tokens leaves nothing to predict. Set it to at least 2.")
    texts = list(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows = [[prefix, *row, *([prefix] if end and row else [])][:length] for row in rows]
    starts = [1] * len(rows)
    if prompts is not None and texts:
        starts = [1 + len(row) for row in tokenizer(list(prompts), add_special_tokens=False)["input_ids"]]
    kept = [(row, start) for row, start in zip(rows, starts, strict=True) if len(row) > start]
    if not kept:
        where = "" if prompts is None else f" behind its prompt within {length} tokens"
        raise UserError(f"{len(texts)} texts were given and none has a token{where}. Check the data set.")
    batch = pad_right([row for row, _ in kept], prefix)
    return batch if prompts is None else replace(batch, starts=torch.tensor([start for _, start in kept]))


def pad_right(rows: Sequence[Sequence[int]], fill: int) -> TokenBatch:
    """Rows of tokens, at least one and none empty, as one batch with `fill` behind those that are shorter."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), fill)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return TokenBatch(tokens, lengths)


END_OF_TEXT = "<|endoftext|>"


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that starts every text: `<|endoftext|>`, with which GPT-2, Pythia and SmolLM were trained.

    It is looked up by name, since chat models move `bos_token` to one that opens a turn; families without it start
    with their `bos_token`.
    """
    token = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.bos_token_id)
    if token is None:
        raise UserError(f"the tokenizer has neither {END_OF_TEXT} nor a bos_token to start a text with.")
    return token
