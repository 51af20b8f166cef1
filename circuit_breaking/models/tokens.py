"""Texts as batches of tokens.

Shapes: n texts, T tokens of the longest (at most the context length).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError


@dataclass(frozen=True)
class TokenBatch:
    """Texts as tokens, padded on the right.

    Attributes:
        tokens: int64 [n, T].
        lengths: number of tokens of each text, prefix token included, int64 [n].
        starts: position of the first token of each text whose prediction counts, int64 [n]; None if all count except
            the prefix token.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Tensor | slice) -> "TokenBatch":
        """The texts of some rows, with padding only up to the longest of them."""
        lengths = self.lengths[rows]
        starts = None if self.starts is None else self.starts[rows]
        return TokenBatch(self.tokens[rows][:, : int(lengths.max())], lengths, starts)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """The same texts on another device."""
        starts = None if self.starts is None else self.starts.to(device)
        return TokenBatch(self.tokens.to(device), self.lengths.to(device), starts)

    @property
    def real(self) -> Tensor:
        """True where a token is not padding: bool [n, T]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.lengths[:, None]

    @property
    def predicted(self) -> Tensor:
        """True where the prediction of the next token counts: bool [n, T]."""
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        before_end = position < self.lengths[:, None] - 1
        return before_end if self.starts is None else before_end & (position >= self.starts[:, None] - 1)

    def batches(self, size: int) -> Iterator["TokenBatch"]:
        """Consecutive batches of at most `size` texts."""
        for start in range(0, len(self), size):
            yield self[start : start + size]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prefix: int,
    length: int,
    end: bool = False,
    prompts: Sequence[str] | None = None,
) -> TokenBatch:
    """Tokenise texts. Each one starts with the prefix token and is truncated to `length` tokens.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: the texts; those without a single token are left out.
        prefix: token that starts every text (see `prefix_token`).
        length: maximum number of tokens of a text, prefix included; at least 2.
        end: append the prefix token to a text that is not truncated, so that its end is predicted too.
        prompts: the beginning of each text. The first token that counts as a prediction is the first one that holds a
            character after the prompt: of "You are " and "stupid." it is " stupid". A text that is truncated before
            that token is left out.

    Raises:
        UserError: no text has a token, `length` leaves nothing to predict, or it cannot be found where a prompt ends.
    """
    if length < 2:
        raise UserError(f"a context of {length} tokens leaves nothing to predict. Set it to at least 2.")
    texts = list(texts)
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    rows = [[prefix, *row, *([prefix] if end and row else [])][:length] for row in rows]
    starts = [1] * len(rows)
    if prompts is not None and texts:
        starts = [1 + start for start in _tokens_before_reply(tokenizer, texts, list(prompts))]
    kept = [(row, start) for row, start in zip(rows, starts, strict=True) if len(row) > start]
    if not kept:
        where = "" if prompts is None else f" behind its prompt within {length} tokens"
        raise UserError(f"{len(texts)} texts were given and none has a token{where}. Check the data set.")
    batch = pad_right([row for row, _ in kept], prefix)
    return batch if prompts is None else replace(batch, starts=torch.tensor([start for _, start in kept]))


def _tokens_before_reply(tokenizer: PreTrainedTokenizerBase, texts: list[str], prompts: list[str]) -> list[int]:
    """How many tokens of each text end within its prompt."""
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [
            next((at for at, (_, end) in enumerate(spans) if end > len(prompt)), len(spans)) if prompt else 0
            for spans, prompt in zip(offsets, prompts, strict=True)
        ]
    counts = []  # no offsets: exact only where the prompt's tokens begin the text's
    for text, prompt in zip(texts, prompts, strict=True):
        row, start = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, prompt))
        if row[: len(start)] != start:
            raise UserError(
                f"the prompt {prompt[-60:]!r} ends inside a token of its text, and the tokenizer "
                f"{type(tokenizer).__name__} does not say which characters a token holds. Let prompts end at the end "
                "of a word, or use a model with a fast tokenizer (tokenizer.json)."
            )
        counts.append(len(start))
    return counts


def pad_right(rows: Sequence[Sequence[int]], fill: int) -> TokenBatch:
    """Make one batch of rows of tokens, padded with `fill`. There must be a row, and none may be empty."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.full((len(rows), int(lengths.max())), fill)
    for row, values in zip(tokens, rows, strict=True):
        row[: len(values)] = torch.tensor(values)
    return TokenBatch(tokens, lengths)


END_OF_TEXT = "<|endoftext|>"


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that starts every text: `<|endoftext|>`, with which GPT-2, Pythia and SmolLM were trained.

    It is looked up by name, because in chat models `bos_token` opens a turn instead. Tokenizers without it use their
    `bos_token`.
    """
    token = tokenizer.get_vocab().get(END_OF_TEXT, tokenizer.bos_token_id)
    if token is None:
        raise UserError(f"the tokenizer has neither {END_OF_TEXT} nor a bos_token to start a text with.")
    return token


def packed(texts: TokenBatch, length: int) -> TokenBatch:
    """Texts joined, each with its prefix token, and cut into full contexts of `length` tokens.

    A context starts with the prefix token and continues wherever the one before it ended; what is left at the end is
    dropped.

    Raises:
        UserError: the texts have fewer tokens than one context.
    """
    prefix, joined = texts.tokens[0, 0], texts.tokens[texts.real][1:]
    count = len(joined) // (length - 1) if length > 1 else 0
    if not count:
        raise UserError(f"the texts have {len(joined)} tokens, too few for a context of {length}. Give more text.")
    body = joined[: count * (length - 1)].view(count, length - 1)
    tokens = torch.cat([prefix.expand(count, 1), body], 1)
    return TokenBatch(tokens, torch.full((count,), length))


def behind(prompts: TokenBatch, texts: TokenBatch, limit: int) -> TokenBatch:
    """Texts behind prompts, the prompts in turn; only the predictions of the texts' own tokens count.

    Args:
        prompts, texts: both with the prefix token before each; that of a text is left out.
        limit: most tokens of a prompt with its text; the text is cut off there.
    """
    rows, starts = [], []
    for number in range(len(texts)):
        at = number % len(prompts)
        prompt = prompts.tokens[at, : prompts.lengths[at]].tolist()
        text = texts.tokens[number, 1 : texts.lengths[number]].tolist()
        rows.append([*prompt, *text][:limit])
        starts.append(len(prompt))
    return replace(pad_right(rows, int(prompts.tokens[0, 0])), starts=torch.tensor(starts))
