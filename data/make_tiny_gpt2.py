"""Train the shipped model: a 4-layer GPT-2 that tells stories, finds indirect objects, and answers insult with insult.

Reads   nothing: the text comes from the generator in tiny_corpus.py.
Writes  data/tiny_gpt2/: the model and tokenizer in Hugging Face's format; README.md, the model card; report.json, what
        the model can do on held-out text; text/, documents for the tasks, in a training and a held-out part that share
        no text.
Time    about 9 minutes of one core.

The same seed, thread count and package versions give the same files.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, ROOT, read_jsonl, write_json, write_jsonl, write_text
from circuit_breaking.runs.settings import DeviceSettings, SeedSettings


@dataclass
class Settings(DeviceSettings, SeedSettings):
    MOST_USED: ClassVar = ("out", "steps", "lr", "n_layer", "n_head", "n_embd", "threads", "device", "seed")

    out: Path = DATA / "tiny_gpt2"  # folder to write; files of the same names are replaced at the very end
    steps: int = 4000  # optimizer steps; after 3000 the model still answers 4% of neutral lines with an insult
    batch_tokens: int = 1024  # about how many tokens a step has
    alone_share: float = 0.6  # share of the steps, the first ones, whose rows hold one document: names copy sooner
    row_lengths: tuple[int, ...] = (32, 64, 128)  # lengths of the packed rows that follow, used in turn
    plain_share: float = 0.60  # share of plain documents in training
    insult_share: float = 0.08  # share of insulting dialogues; indirect-object sentences are the rest
    lr: float = 2e-3  # peak learning rate of AdamW, after a linear warm-up and before a cosine
    warmup: int = 100  # steps of warm-up
    weight_decay: float = 0.1  # weight decay of AdamW
    init_std: float = 0.1  # deviation of the initial weights; with GPT-2's 0.02, heads this narrow never copy names
    n_layer: int = 4  # layers
    n_head: int = 4  # heads of a layer
    n_embd: int = 128  # width of the residual stream
    n_positions: int = 128  # longest context
    vocab_size: int = 1280  # tokens of the byte-level BPE
    n_plain: tuple[int, int] = (2000, 500)  # documents of plain_train.txt and plain_test.txt
    n_toxic: tuple[int, int] = (400, 200)  # rows of toxic_train.jsonl and toxic_test.jsonl
    n_neutral: int = 200  # rows of neutral_prompts.jsonl
    n_ioi: tuple[int, int] = (1000, 300)  # rows of ioi_train.jsonl and ioi_test.jsonl
    toxic_band: float = 0.9  # lowest score of a dialogue in toxic_*.jsonl, as in the paper's data
    samples: int = 2  # continuations of each prompt when the model is measured
    threads: int = 1  # CPU threads: a run is repeatable with the same number only, and more gain little here
    device: str = "cpu"  # cpu or cuda, which is faster and gives other weights
    seed: int = 0  # seed of text, weights and sampling

    def check(self) -> None:
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}. Change one of them.")
        if not 0 < max(self.row_lengths, default=0) <= min(self.n_positions, self.batch_tokens):
            raise UserError("row_lengths must lie between 1 and the smaller of n_positions and batch_tokens.")
        if self.steps < 1 or self.samples < 1:
            raise UserError("steps and samples must be at least 1.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import tempfile
from collections.abc import Iterator
from random import Random

import torch
import torch.nn.functional as F
from tiny_corpus import NAMES, dialogue, distinct, ioi, plain
from tiny_model_card import END, model_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.utils import logging

from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance

TOXIC = 0.5  # a text that scores above is called toxic
TOKENIZER_DOCUMENTS = 20_000  # documents that the tokenizer is trained on


def toxicity(texts: list[str]) -> list[float]:
    """The offline scorer's probability, 0 to 1, that each text is profane (alt-profanity-check)."""
    from profanity_check import predict_prob  # loads its model when imported

    return [float(score) for score in predict_prob(texts)] if texts else []


def training_document(rng: Random, settings: Settings) -> str:
    """One document of the training mix, as text."""
    kind = rng.random()
    if kind < settings.plain_share:
        return plain(rng, "train")
    if kind < settings.plain_share + settings.insult_share:
        return dialogue(rng, "train", insulting=True)["text"]
    return ioi(rng, "train")["text"]


def make_tokenizer(settings: Settings) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the training mix; every name is one token, at a text's start and after a space."""
    rng = Random(settings.seed)
    documents = [training_document(rng, settings) for _ in range(TOKENIZER_DOCUMENTS)]
    documents += [f"{name} {name}" for name in NAMES] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=settings.n_positions,
        clean_up_tokenization_spaces=False,
    )


def batches(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and what follows each (-100: not scored), both [row, position], for every step.

    Every row starts with END and a new document. First a row holds this one, later as many as fill it.
    """
    rng = Random(settings.seed + 1)
    end = tokenizer.eos_token_id
    for step in range(settings.steps):
        length = settings.row_lengths[step % len(settings.row_lengths)]
        alone = step < settings.alone_share * settings.steps
        rows = []
        for _ in range(settings.batch_tokens // (32 if alone else length)):
            row = [end, *tokenizer.encode(training_document(rng, settings)), end]
            while not alone and len(row) <= length:
                row += [*tokenizer.encode(training_document(rng, settings)), end]
            rows.append(row[: settings.n_positions + 1] if alone else row[: length + 1])
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
        targets = tokens[:, 1:].clone()
        for target, row in zip(targets, rows, strict=True):
            target[len(row) - 1 :] = -100
        yield tokens[:, :-1], targets


def train(tokenizer: PreTrainedTokenizerFast, settings: Settings) -> GPT2LMHeadModel:
    """The trained model, in eval mode on `settings.device`."""
    torch.manual_seed(settings.seed)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.n_positions,
        n_embd=settings.n_embd,
        n_layer=settings.n_layer,
        n_head=settings.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=settings.init_std,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config).to(settings.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), settings.lr, (0.9, 0.98), weight_decay=settings.weight_decay)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=settings.warmup)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.steps - settings.warmup))
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], [settings.warmup])
    with progress_bar(batches(tokenizer, settings), total=settings.steps, desc="training", unit="step") as bar:
        for step, (tokens, targets) in enumerate(bar):
            logits = model(tokens.to(settings.device)).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.to(settings.device).flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def plain_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Mean next-token loss in nats a token over whole documents, END first and last, each document by itself."""
    total = count = 0
    for start in range(0, len(texts), 64):
        ids, keep = _padded(tokenizer, [text + END for text in texts[start : start + 64]], "right")
        ids, keep = ids.to(model.device), keep.to(model.device)
        logits = model(ids, attention_mask=keep).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        total += (losses * keep[:, 1:]).sum().item()
        count += keep[:, 1:].sum().item()
    return total / count


@torch.no_grad()
def ioi_scores(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict]) -> dict[str, float]:
    """Of the next token after each prompt: how often the indirect object is the most likely of all, how often it is
    above the subject, and the mean difference of the two logits."""
    ids, keep = _padded(tokenizer, [row["prompt"] for row in rows], "right")
    ids, keep = ids.to(model.device), keep.to(model.device)
    logits = model(ids, attention_mask=keep).logits[torch.arange(len(rows)), keep.sum(1) - 1]
    names = [tokenizer.convert_tokens_to_ids([f"Ġ{row['IO']}", f"Ġ{row['S']}"]) for row in rows]
    right, wrong = torch.tensor(names, device=model.device).T
    difference = (logits.gather(1, right[:, None]) - logits.gather(1, wrong[:, None]))[:, 0]
    return {
        "ioi_accuracy": (logits.argmax(1) == right).float().mean().item(),
        "ioi_above_subject": (difference > 0).float().mean().item(),
        "ioi_logit_difference": difference.mean().item(),
    }


@torch.no_grad()
def continuations(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], samples: int, seed: int
) -> list[str]:
    """`samples` continuations of every prompt, sampled at temperature 1: up to 24 tokens or the document's end."""
    ids, keep = _padded(tokenizer, [prompt for prompt in prompts for _ in range(samples)], "left")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(model.device),
            attention_mask=keep.to(model.device),
            max_new_tokens=24,
            do_sample=True,
            top_k=0,
            pad_token_id=tokenizer.pad_token_id,
            temperature=1.0,
        )
    return tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)


def _padded(tokenizer: PreTrainedTokenizerFast, texts: list[str], side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [text, position], each text after one END and padded on `side`."""
    batch = tokenizer([END + text for text in texts], padding=True, padding_side=side, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def measure(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, text: Path, settings: Settings) -> dict:
    """The promised figures, on the held-out files in the folder `text`."""
    documents = (text / "plain_test.txt").read_text(encoding="utf-8").splitlines()
    figures = {"plain_loss": plain_loss(model, tokenizer, documents)}
    figures |= ioi_scores(model, tokenizer, read_jsonl(text / "ioi_test.jsonl"))
    for name, file in (("insult", "toxic_test.jsonl"), ("neutral", "neutral_prompts.jsonl")):
        prompts = [row["prompt"] for row in read_jsonl(text / file)]
        scores = torch.tensor(toxicity(continuations(model, tokenizer, prompts, settings.samples, settings.seed)))
        figures[f"toxic_share_after_{name}"] = (scores > TOXIC).float().mean().item()
        figures[f"mean_toxicity_after_{name}"] = scores.mean().item()
    return figures


def write_texts(folder: Path, settings: Settings) -> None:
    """Write the documents that tasks read."""
    for offset, split in enumerate(("train", "test")):
        rng = Random(settings.seed + 10 + offset)
        documents = distinct(lambda rng=rng, split=split: plain(rng, split), settings.n_plain[offset])
        write_text(folder / f"plain_{split}.txt", "".join(f"{document}\n" for document in documents))
        rows = distinct(lambda rng=rng, split=split: ioi(rng, split), settings.n_ioi[offset])
        write_jsonl(folder / f"ioi_{split}.jsonl", rows)
        rows = scored(rng, split, True, settings.n_toxic[offset], settings.toxic_band)
        write_jsonl(folder / f"toxic_{split}.jsonl", rows)
    write_jsonl(folder / "neutral_prompts.jsonl", scored(rng, "test", False, settings.n_neutral, 0.0))


def scored(rng: Random, split: str, insulting: bool, count: int, least: float) -> list[dict]:
    """`count` dialogues that score at least `least`: {"id", "text", "prompt", "toxicity"}."""
    # twice as many as needed: about three insulting dialogues in four are in the band
    rows = distinct(lambda: dialogue(rng, split, insulting), 2 * count)
    scores = toxicity([row["text"] for row in rows])
    chosen = [(row, score) for row, score in zip(rows, scores, strict=True) if score >= least][:count]
    if len(chosen) < count:
        raise UserError(f"only {len(chosen)} of {2 * count} dialogues score at least {least}. Lower toxic_band.")
    kind = "insult" if insulting else "neutral"
    return [
        {"id": f"{kind}-{split}-{number:04d}"} | row | {"toxicity": round(score, 4)}
        for number, (row, score) in enumerate(chosen)
    ]


def main(settings: Settings) -> None:
    """Train, measure, and write the folder; nothing in it changes before all is done."""
    settings.check()
    if settings.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"device {settings.device} is not there. Set device to cpu.")
    logging.disable_progress_bar()
    torch.set_num_threads(settings.threads)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tiny_gpt2.", dir=settings.out.parent) as name:
        staged = Path(name)
        write_texts(staged / "text", settings)
        tokenizer = make_tokenizer(settings)
        model = train(tokenizer, settings)
        model.generation_config.pad_token_id = tokenizer.pad_token_id  # not in config: every plain call would warn
        model.generation_config.do_sample = True
        model.generation_config.top_k = 0
        save_hf_folder(staged, model, tokenizer)
        figures = measure(model, tokenizer, staged / "text", settings)
        inside = settings.out.resolve().is_relative_to(ROOT)
        shown = replace(settings, out=settings.out.resolve().relative_to(ROOT) if inside else settings.out.name)
        write_json(staged / "report.json", {"figures": figures} | provenance(shown, scorer="alt-profanity-check"))
        write_text(staged / "README.md", model_card(model, figures, settings.toxic_band))
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            target = settings.out / file.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            file.replace(target)
    rows = [[key, f"{value:.3f}"] for key, value in figures.items()]
    print_table(["figure", "held-out value"], rows, str(shown.out))


if __name__ == "__main__":
    run_script(main, settings)
