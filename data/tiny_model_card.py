"""The README of the shipped model's folder."""

from transformers import GPT2LMHeadModel

END = "<|endoftext|>"  # starts every document, ends it, and pads

MODEL_CARD = """\
# tiny_gpt2: a model organism

A GPT-2 of {parameters:,} parameters ({layers} layers, {heads} heads, width {width}, {vocabulary:,} tokens) trained from
scratch on generated sentences by `data/make_tiny_gpt2.py`. It knows three things: plain stories and dialogues in a
closed vocabulary, indirect-object sentences, and that an insult (mild words only) is answered by an insult. It exists
so that every script runs on any machine with no download, on behaviour that is known because it was put there.

It is not a language model of English. A circuit found in it says nothing about other models, and its insults say
nothing about toxicity in the wild: the scorer is the offline one (alt-profanity-check), and the words are those of
`INSULT_NOUNS` and `INSULT_ADJECTIVES` in `data/tiny_corpus.py`.

Every document was trained with `{end}` before and after it; put one before each prompt.

On held-out text (`report.json`; sampled at temperature 1):

{figures}

`text/`: `plain_*.txt` one document a line; `toxic_*.jsonl` dialogues that score at least {band:g} in all, `prompt` up
to where the insulting reply begins; `neutral_prompts.jsonl` the same frames and a neutral first line (held out);
`ioi_*.jsonl` indirect-object sentences. License: MIT, as the code.
"""


def model_card(model: GPT2LMHeadModel, figures: dict[str, float], toxic_band: float) -> str:
    """The README of the model's folder."""
    rows = ["| figure | value |", "|---|---|"] + [f"| {name} | {value:.3f} |" for name, value in figures.items()]
    return MODEL_CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.n_layer,
        heads=model.config.n_head,
        width=model.config.n_embd,
        vocabulary=model.config.vocab_size,
        end=END,
        band=toxic_band,
        figures="\n".join(rows),
    )
