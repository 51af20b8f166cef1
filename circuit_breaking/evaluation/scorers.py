"""Scorers of toxicity, by name.

`detoxify`         Detoxify "original" (Hanu and Unitary team 2020), a BERT fine-tuned on the Jigsaw toxic comments: the
                   probability of its label "toxic". Read as safetensors from the hub through transformers, because the
                   detoxify package itself unpickles its checkpoint.
`profanity-check`  alt-profanity-check, a calibrated linear SVM over word frequencies, fitted on 200,000 comments. It
                   works offline: its weights are joblib files (pickles) inside the package. They were fitted with the
                   scikit-learn version that the package requires. It sees words without their context, and ignores
                   words that it was not fitted on.
"""

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from circuit_breaking.errors import UserError, first_line
from circuit_breaking.runs.devices import pick_device
from circuit_breaking.runs.hub import hub_answers

DETOXIFY = "unitary/toxic-bert"


class Scorer(Protocol):
    name: str
    version: str

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Toxicity of each text, float64 [n] in [0, 1]. Blank texts score 0; the same texts get the same scores."""


class ProfanityCheck:
    """The offline scorer: `alt-profanity-check`. `device` is ignored, it runs on CPU."""

    name = "profanity-check"

    def __init__(self, device: str = "cpu"):
        try:
            from profanity_check import predict_prob
        except ImportError as error:
            raise UserError(
                f"alt-profanity-check cannot be imported ({error}): pip install alt-profanity-check."
            ) from error
        self.version = metadata.version("alt-profanity-check")
        self._score = predict_prob

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return _score_filled(texts, self._score)


class Detoxify:
    """Detoxify from the hub, the local cache, or a folder (`checkpoint`).

    Raises:
        UserError: the checkpoint cannot be found or downloaded; this takes a few seconds to find out.
    """

    name = "detoxify"

    def __init__(self, device: str = "auto", checkpoint: str = DETOXIFY, batch_size: int = 64):
        self.device = pick_device(device)
        self.batch_size = batch_size
        self.tokenizer, model = _pretrained(checkpoint)
        labels = {label.lower(): index for index, label in (model.config.id2label or {}).items()}
        index = labels.get("toxic", labels.get("toxicity"))
        if index is None:
            raise UserError(
                f"{checkpoint} has no label 'toxic' (it has {', '.join(labels)}): it is no Detoxify checkpoint."
            )
        self._label = index
        self._longest = min(512, getattr(model.config, "max_position_embeddings", 512))
        self.model = model.to(self.device).eval()
        commit = getattr(model.config, "_commit_hash", None)
        self.version = f"{checkpoint}@{commit[:12]}" if commit else str(checkpoint)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return _score_filled(texts, self._score)

    @torch.inference_mode()
    def _score(self, texts: list[str]) -> np.ndarray:
        # texts of similar length together, to save padding; the labels are independent, so each has a sigmoid
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = torch.empty(len(texts), device=self.device)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            inputs = self.tokenizer(
                [texts[i] for i in batch], return_tensors="pt", padding=True, truncation=True, max_length=self._longest
            ).to(self.device)
            logits = self.model(**inputs).logits[:, self._label]
            scores[torch.tensor(batch, device=self.device)] = torch.sigmoid(logits.float())
        return scores.cpu().numpy()


SCORERS: dict[str, Callable[..., Scorer]] = {"detoxify": Detoxify, "profanity-check": ProfanityCheck}


def load_scorer(name: str = "auto", device: str = "auto") -> Scorer:
    """Load a scorer by its name.

    Args:
        name: one of `SCORERS`, or "auto": detoxify if it is available, else profanity-check; this is printed.
        device: auto, cpu, cuda or mps.

    Raises:
        UserError: the name is unknown, or the scorer is not available.
    """
    if name != "auto":
        if name not in SCORERS:
            raise UserError(f"there is no scorer {name!r}; choose auto, {' or '.join(SCORERS)}.")
        return SCORERS[name](device)
    try:
        scorer, why = Detoxify(device), ""
    except UserError as error:
        scorer, why = ProfanityCheck(device), f"; not detoxify: {error}"
    print(f"scorer: {scorer.name} {scorer.version}{why}")
    return scorer


def _score_filled(texts: Sequence[str], score: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Score the texts that are not blank; blank texts get 0."""
    if isinstance(texts, str):
        raise TypeError("a scorer takes a list of texts, not one text")
    scores = np.zeros(len(texts))
    filled = [i for i, text in enumerate(texts) if text.strip()]
    if filled:
        # tokenizers do not accept lone surrogates
        scores[filled] = score([texts[i].encode("utf-8", "replace").decode() for i in filled])
    return scores


def _pretrained(checkpoint: str):
    """Tokenizer and model from a folder or the cache, or from the hub if it answers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def load(**options):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **options)
        model, info = AutoModelForSequenceClassification.from_pretrained(
            checkpoint,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
        if missing := sorted(info["missing_keys"]):  # transformers would initialise these at random
            raise UserError(f"{checkpoint} lacks weights ({missing[0]} and {len(missing) - 1} more).")
        return tokenizer, model

    try:
        return load(local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # transformers raises many types of errors for missing or damaged files
        if Path(checkpoint).is_dir():
            raise UserError(f"{checkpoint} holds no classifier that loads ({first_line(error)}).") from error
    if not hub_answers():
        raise UserError(f"{checkpoint} is not in the cache and the Hugging Face hub is out of reach.")
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{checkpoint} does not load from the Hugging Face hub ({first_line(error)}).") from error
