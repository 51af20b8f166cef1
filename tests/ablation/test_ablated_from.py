"""Cuts that act from a given position on (`ablate_from`) in stock models, against the engine and the reference."""

import copy

import pytest
import torch
from helpers.models import small_gpt2, small_llama, small_neox, small_qwen3, two_layers
from test_ablated import some_edges
from transformers import DynamicCache, StaticCache

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.errors import UserError
from circuit_breaking.models.families import describe

TOKENS = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
KEYWORDS = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
FAMILIES = pytest.mark.parametrize("make", [small_gpt2, small_neox, small_llama])
COMPILED = pytest.mark.parametrize(
    "make", [small_gpt2, *(pytest.param(make, marks=pytest.mark.slow) for make in (small_neox, small_llama))]
)
STARTS = pytest.mark.parametrize("ablate_from", [0, 1, 3])
KINDS = pytest.mark.parametrize("kind", ["zero", "mean"])


def means_of(hf, kind: str) -> torch.Tensor | None:
    if kind == "zero":
        return None
    shape = len(describe(hf).graph().sources), hf.config.hidden_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=hf.dtype)


def edges_of(hf, count: int = 25) -> list[str]:
    """Random edges, and some of each kind of reader and source: an MLP's own heads, the last MLP and `output`."""
    last = hf.config.num_hidden_layers - 1
    own = [] if describe(hf).graph().parallel else ["a1.0->m1", f"a{last}.1->m{last}"]
    return [*some_edges(hf, count), *own, "m1->output", "embed->a0.0.q", "embed->m0", "m0->a1.1.k", "m0->a1.1.v"]


def logits(hf, tokens=TOKENS, **keywords) -> torch.Tensor:
    with torch.no_grad():
        return hf(tokens, **keywords).logits


def engine_of(hf, edges, means, ablate_from):
    engine = load_model(hf, split_qkv=True, device="cpu", dtype=str(hf.dtype).removeprefix("torch."))
    engine.means, engine.ablate_from = means, ablate_from
    engine.mask.cut_(edges)
    return engine


@FAMILIES
@STARTS
@KINDS
@pytest.mark.parametrize("count", [25, 10**6])
def test_logits_equal_the_reference(make, ablate_from, kind, count):
    hf = make().double()
    edges, means = edges_of(hf, count), means_of(hf, kind)
    engine = engine_of(hf, edges, means, ablate_from)
    with torch.no_grad():
        reference = ReferenceModel(hf, split_qkv=True)(TOKENS, engine.mask.weights, means, ablate_from)
        with ablate(hf, edges, means, ablate_from) as handle:
            found = hf(TOKENS).logits
    assert handle.ablate_from == ablate_from
    tolerance = 1e-10 if make is not small_llama else 2e-4  # Hugging Face's RMSNorm goes through float32 even here
    assert (found - reference).abs().max() < tolerance
    whole = logits(hf)
    assert (found[:, ablate_from:] - whole[:, ablate_from:]).abs().amax((0, 2)).min() > 1e-6
    assert torch.allclose(found[:, :ablate_from], whole[:, :ablate_from], atol=tolerance)


def test_queries_keys_and_values_that_are_separated_by_the_cuts():
    """Heads that share normalised keys until they are cut off from different nodes."""
    hf = small_qwen3()
    edges = ["m0->a1.1.k", "embed->a2.3.v", "m0->a2.1.q", "embed->a2.3.q"]
    expected = engine_of(hf, edges, None, 2)(TOKENS).detach()
    with ablate(hf, edges, ablate_from=2):
        assert torch.allclose(logits(hf), expected, atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("edges", [["m2->output"], ["a1.0->m2"], "everything into output", "everything into m1"])
def test_single_readers(make, edges):
    """Also readers all of whose edges are cut, so that no layer carries anything to them."""
    hf = make()
    split = load_model(hf, split_qkv=True, device="cpu").graph
    if isinstance(edges, str):
        target = edges.rpartition(" ")[2]
        edges = [edge for edge in split.edges if edge.target == target]
    means = means_of(hf, "mean")
    expected = engine_of(hf, edges, means, 2)(TOKENS).detach()
    with ablate(hf, edges, means, 2):
        assert torch.allclose(logits(hf), expected, atol=1e-4)


# Positions: with the cache, in chunks, in turns, with padding


@FAMILIES
@STARTS
@KINDS
def test_caches_chunks_and_turns_equal_the_full_pass(make, ablate_from, kind):
    hf = make()
    with ablate(hf, edges_of(hf), means_of(hf, kind), ablate_from):
        full = logits(hf)
        for lengths, static, masked in (([1, 1, 1, 6], False, False), ([2, 7], True, False), ([5, 1, 3], False, True)):
            cache = StaticCache(config=hf.config, max_cache_len=12) if static else DynamicCache(config=hf.config)
            done, found = 0, []
            for length in lengths:
                given = {"attention_mask": torch.ones(2, done + length)} if masked else {}
                found.append(logits(hf, TOKENS[:, done : done + length], cache=cache, use_cache=True, **given))
                done += length
            assert torch.allclose(torch.cat(found, 1), full, atol=2e-5)


@FAMILIES
@STARTS
@KINDS
def test_left_padded_batches_equal_single_texts(make, ablate_from, kind):
    hf = make()
    texts = [TOKENS[0, :length] for length in (3, 7, 5)]
    tokens = torch.stack([torch.cat([torch.zeros(7 - len(text), dtype=torch.long), text]) for text in texts])
    mask = torch.stack([(torch.arange(7) >= 7 - len(text)).long() for text in texts])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = [{"position_ids": positions}]
    if make is not small_gpt2:  # positions that count the padding change nothing where they are relative
        given += [{}, {"position_ids": torch.arange(7)[None]}]
    with ablate(hf, edges_of(hf), means_of(hf, kind), ablate_from):
        alone = [logits(hf, text[None])[0] for text in texts]
        for keywords in given:
            together = logits(hf, tokens, attention_mask=mask, **keywords)
            for text, expected, row in zip(texts, alone, together, strict=True):
                assert torch.allclose(row[-len(text) :], expected, atol=2e-5)
        together = hf.generate(tokens, attention_mask=mask, **KEYWORDS)[:, 7:]
        for text, row in zip(texts, together, strict=True):
            assert hf.generate(text[None], attention_mask=torch.ones_like(text[None]), **KEYWORDS)[
                0, len(text) :
            ].equal(row)


@FAMILIES
@STARTS
def test_generate_equals_the_engine_with_every_cache_and_beams(make, ablate_from):
    hf = make()
    edges, means = edges_of(hf), means_of(hf, "mean")
    engine, expected = engine_of(hf, edges, means, ablate_from), TOKENS[:, :2]
    for _ in range(7):
        expected = torch.cat([expected, engine(expected)[:, -1:].argmax(-1)], 1)
    with ablate(hf, edges, means, ablate_from):
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 1}):
            assert hf.generate(TOKENS[:, :2], **KEYWORDS, **cache).equal(expected), cache
        beams = [hf.generate(TOKENS[:, :2], **KEYWORDS, num_beams=3, use_cache=use) for use in (False, True)]
        assert beams[0].equal(beams[1])
        looked_up = hf.generate(TOKENS[:1, :2], **KEYWORDS, prompt_lookup_num_tokens=2)
        assert looked_up.equal(expected[:1])


def test_several_turns_with_one_cache():
    hf = small_llama()
    with ablate(hf, edges_of(hf), ablate_from=3):
        cache = DynamicCache(config=hf.config)
        first = hf.generate(TOKENS[:1, :2], **KEYWORDS | {"max_new_tokens": 3}, cache=cache)
        text = torch.cat([first, TOKENS[:1, 2:5]], 1)
        again = hf.generate(text, **KEYWORDS, cache=cache)
        assert again.equal(hf.generate(text, **KEYWORDS))


def test_texts_in_one_row_begin_where_their_positions_do():
    hf = small_llama(attn_implementation="sdpa")
    packed, positions = torch.cat([TOKENS[:1], TOKENS[1:]], 1), torch.arange(9).repeat(2)[None]
    with ablate(hf, edges_of(hf), ablate_from=2):
        together = logits(hf, packed, position_ids=positions, use_cache=False)
        assert torch.allclose(together.view(2, 9, -1), logits(hf), atol=2e-5)


def test_what_positions_cannot_be_known_from():
    hf = small_gpt2()
    cache = DynamicCache(config=hf.config)
    with ablate(hf, ["m0->m1"], ablate_from=1):
        square = torch.ones(2, 1, 9, 9).tril()
        with pytest.raises(UserError, match="does not say where texts begin"):
            logits(hf, attention_mask=square.bool())
        logits(hf, attention_mask=square.bool(), position_ids=torch.arange(9)[None])
        logits(hf, cache=cache, use_cache=True)
        with pytest.raises(UserError, match=r"for 1 tokens, and there are 10 with those in the KV cache"):
            logits(hf, TOKENS[:, :1], cache=cache, use_cache=True, attention_mask=torch.ones(2, 1))
        with pytest.raises(UserError, match="called by itself"):
            hf.transformer.h[1](torch.zeros(1, 2, 48))
    for value in (-1, 1.0, True, None):
        with pytest.raises(UserError, match="first position at which cuts act"):
            ablate(hf, ["m0->m1"], ablate_from=value)


def test_a_cache_of_another_ablate_from_is_refused():
    hf = small_gpt2()
    cache = DynamicCache(config=hf.config)
    with ablate(hf, ["m0->m1"], ablate_from=1):
        logits(hf, TOKENS[:, :4], cache=cache, use_cache=True)
    with ablate(hf, ["m0->m1"]), pytest.raises(UserError, match="filled before these edges were cut"):
        logits(hf, TOKENS[:, 4:], cache=cache, use_cache=True)


# Other people's code


@COMPILED
def test_compiled(make):
    hf = two_layers(make)
    edges, whole = edges_of(hf), logits(hf, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(hf, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, use_cache=False), whole)
    for ablate_from in (1, 3):
        with ablate(hf, edges, ablate_from=ablate_from):
            for mask in (None, (torch.arange(9) >= torch.tensor([[0], [2]])).long()):
                cut = logits(hf, use_cache=False, attention_mask=mask)
                torch.testing.assert_close(logits(compiled, use_cache=False, attention_mask=mask), cut)
    torch.testing.assert_close(logits(compiled, use_cache=False), whole)
    torch._dynamo.reset()


@FAMILIES
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(make, reentrant):
    gradients = []
    for checkpointed in (False, True):
        hf = make()
        for module in hf.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            hf.gradient_checkpointing_enable({"use_reentrant": reentrant})
            hf.enable_input_require_grads()
        hf.train().requires_grad_(True)
        with ablate(hf, edges_of(hf), ablate_from=3):
            hf(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in hf.parameters()])
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


def test_without_it_nothing_is_added():
    hf = small_gpt2()
    with ablate(hf, edges_of(hf), ablate_from=0), torch.no_grad():
        width = hf.transformer.h[0](torch.zeros(1, 2, 24)).shape[-1]
    with ablate(hf, edges_of(hf), ablate_from=1):
        twin = copy.deepcopy(hf)
        out = twin.transformer.h[0](torch.zeros(1, 2, 24), edge_cuts_ablated=torch.ones(1, 2, dtype=torch.bool))
    assert out.shape[-1] == width
