"""What models write after prompts, against plain loops."""

import math

import numpy as np
import pytest
import torch
from helpers.models import small_gpt2
from test_evaluation import ROWS
from transformers import GenerationConfig

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.generate import Sampling, continuations, pad_left
from circuit_breaking.models.tokens import pad_right


def test_padding_moves_to_the_left():
    tokens, attention = pad_left(pad_right(ROWS, 0))
    for row, moved, real in zip(ROWS, tokens, attention, strict=True):
        assert moved[real.bool()].tolist() == row
        assert real.tolist() == [0] * (6 - len(row)) + [1] * len(row)


def greedy_by_hand(hf, row, new, end):
    row, start = list(row), len(row)
    while len(row) < start + new and (len(row) == start or row[-1] != end):
        row.append(int(hf(torch.tensor([row])).logits[0, -1].argmax()))
    return row[start:]


def test_a_sure_model_writes_what_it_would_without_padding(family):
    hf = family()
    with torch.no_grad():
        hf.get_output_embeddings().weight.mul_(1000)  # sampling is then as good as greedy
    hf.config.final_logit_softcapping = None  # which would make many logits equal
    first = [greedy_by_hand(hf, row, 1, -1)[0] for row in ROWS]
    for end in (49, first[2]):  # with the second, a row ends at once
        rows = continuations(hf, pad_right(ROWS, 0), Sampling(end, samples=2, new_tokens=6, batch_size=3))
        expected = [greedy_by_hand(hf, row, 6, end) for row in ROWS]
        assert rows == [row for row in expected for _ in range(2)]
    assert rows[4] == [end]


def test_sampling_is_from_the_whole_distribution_whatever_the_model_is_set_to():
    hf = small_gpt2()
    sampling = Sampling(end=49, samples=6000, new_tokens=1, batch_size=1000)
    prompt = pad_right([[0, 5, 7]], 0)
    plain = continuations(hf, prompt, sampling)
    shares = np.bincount([row[0] for row in plain], minlength=50) / 6000
    probabilities = hf(prompt.tokens).logits[0, -1].softmax(-1).numpy()
    assert np.abs(shares - probabilities).max() < 4 * math.sqrt(0.25 / 6000)
    assert (shares > 0).sum() > 40
    own = hf.generation_config = GenerationConfig(top_k=1, temperature=0.1, repetition_penalty=9.0, min_new_tokens=1)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert continuations(hf, prompt, sampling) == plain
    assert hf.generation_config is own and torch.equal(torch.get_rng_state(), state)
    assert continuations(hf, prompt, Sampling(49, 6000, 1, 1000, seed=1)) != plain


def test_what_cannot_be_sampled():
    hf = small_gpt2()
    with pytest.raises(UserError, match="up to 33 tokens and the model 32 positions"):
        continuations(hf, pad_right([[0, 5, 7]], 0), Sampling(49, new_tokens=30))
    with torch.no_grad():
        hf.transformer.ln_f.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError):
        continuations(hf, pad_right([[0, 5, 7]], 0), Sampling(49))
