"""Cut edges in models that other libraries offload, quantise, compile, or serve."""

import pytest
import torch
from helpers.models import small_gpt2, small_llama, small_neox, two_layers
from test_ablated import some_edges
from test_other_hands import TOKENS, generated, logits
from transformers import CompileConfig, StaticCache

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError

FAMILIES = pytest.mark.parametrize("make", [small_gpt2, small_neox, small_llama])
COMPILED = pytest.mark.parametrize(
    "make", [small_gpt2, *(pytest.param(make, marks=pytest.mark.slow) for make in (small_neox, small_llama))]
)


@FAMILIES
def test_continuous_batching_is_refused(make):
    hf = make()
    refused = pytest.raises(UserError, match=r"generate_batch \(continuous batching\) does not support cut edges")
    with ablate(hf, some_edges(hf, 20)) as handle, refused:
        hf.generate_batch([[3, 4, 5], [6, 7]], max_new_tokens=2)
    with handle, pytest.raises(UserError, match="continuous batching"):
        hf.init_continuous_batching()
    with ablate(hf, []):
        hf.init_continuous_batching()


def test_a_cache_without_a_length_is_refused():
    hf = small_llama()
    with ablate(hf, ["m0->m1"]), pytest.raises(UserError, match="do not support this KV cache, a object"):
        hf(TOKENS, cache=object())


@FAMILIES
def test_running_fewer_layers_is_refused(make):
    hf = make()
    with ablate(hf, some_edges(hf, 20)):
        with pytest.raises(UserError, match="assistant_early_exit does not support cut edges"):
            generated(hf, TOKENS[:1], assistant_early_exit=1)
        assert hf.config.num_hidden_layers == 3
        hf.config.num_hidden_layers = 1
        with pytest.raises(UserError, match="only 1 of its 3 layers are to run"):
            logits(hf)


@COMPILED
def test_exported_programs_are_cut(make):
    hf = make()
    with ablate(hf, some_edges(hf, 20)):
        program = torch.export.export(hf, (), {"input_ids": TOKENS, "use_cache": False}, strict=False)
        torch.testing.assert_close(program.module()(input_ids=TOKENS, use_cache=False).logits, logits(hf))


def test_shapes_are_known_without_weights():
    hf = small_gpt2()
    with ablate(hf, some_edges(hf, 20)):
        assert hf.to("meta")(TOKENS.to("meta")).logits.shape == (*TOKENS.shape, 50)


# accelerate


@FAMILIES
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_after_the_cut(make, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    hf = make()
    edges, whole = some_edges(hf, 20), logits(hf)
    handle = ablate(hf, edges)
    cut = logits(hf)
    if where == "cpu":
        accelerate.cpu_offload(hf, execution_device="cpu")
    else:
        accelerate.disk_offload(hf, tmp_path, execution_device="cpu")
    torch.testing.assert_close(logits(hf), cut)
    assert generated(hf).shape == (2, 16)
    with pytest.raises(UserError, match="offloaded"):
        ablate(hf, edges)
    handle.remove()
    torch.testing.assert_close(logits(hf), whole)
    with handle:
        torch.testing.assert_close(logits(hf), cut)
    accelerate.hooks.remove_hook_from_submodules(hf)
    torch.testing.assert_close(logits(hf), whole)


@FAMILIES
def test_hooks_of_accelerate_that_go_while_edges_are_cut(make):
    hooks = pytest.importorskip("accelerate.hooks")
    hf = make()
    edges, whole = some_edges(hf, 20), logits(hf)
    with ablate(hf, edges):
        cut = logits(hf)
    hooks.add_hook_to_module(hf, hooks.ModelHook())
    hooks.attach_align_device_hook(hf, execution_device="cpu")
    handle = ablate(hf, edges)
    torch.testing.assert_close(logits(hf), cut)
    hooks.remove_hook_from_submodules(hf)
    torch.testing.assert_close(logits(hf), cut)
    handle.remove()
    torch.testing.assert_close(logits(hf), whole)
    with handle:
        torch.testing.assert_close(logits(hf), cut)


# Quantised weights: torchao gives a plain linear module a weight of another class


class Quantised(torch.Tensor):
    """Stands for the tensor classes of torchao."""


def quantise(module: torch.nn.Module) -> None:
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Quantised), requires_grad=False)


@FAMILIES
def test_quantised_weights_are_refused(make):
    hf = make()
    edges = some_edges(hf, 20)
    mlp = next(module for name, module in hf.named_modules() if name.endswith(("1.mlp.c_proj", "down_proj", "4h_to_h")))
    quantise(mlp)
    for use in (lambda: ablate(hf, edges), lambda: load_model(hf, device="cpu")):
        with pytest.raises(UserError, match=r"is quantised \(Quantised\)"):
            use()


@FAMILIES
def test_weights_that_are_quantised_after_the_cut_are_refused(make):
    hf = make()
    with ablate(hf, ["m0->a1.0", "a1.0->m2"]):
        logits(hf)
        for name, module in hf.named_modules():
            if name.endswith(("attn.c_attn", "q_proj", "query_key_value")):
                quantise(module)
        with pytest.raises(UserError, match="became a Quantised after the edges were cut"):
            logits(hf)


# torch.compile


def static(compiled: bool, **changes) -> dict:
    """Settings of `generate` with a static cache, for which transformers can compile decoding."""
    config = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # else only on a GPU
    return {"cache_implementation": "static", "compile_config": config if compiled else None, **changes}


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("ablate_from", [0, 3])
def test_generate_compiles_decoding_with_a_static_cache(make, ablate_from):
    hf = make()
    edges, whole = some_edges(hf, 15), generated(hf)
    torch._dynamo.reset()
    assert generated(hf, **static(compiled=True)).equal(whole)
    with ablate(hf, edges, ablate_from=ablate_from):
        cut = generated(hf)
        assert not cut.equal(whole)
        assert generated(hf, **static(compiled=True)).equal(cut)
        assert generated(hf, **static(compiled=False)).equal(cut)
    assert generated(hf, **static(compiled=True)).equal(whole)
    torch._dynamo.reset()


@COMPILED
def test_one_cut_after_another_in_a_compiled_model(make):
    hf = two_layers(make)
    torch._dynamo.reset()
    compiled = torch.compile(hf, backend="aot_eager")
    for seed in range(3):
        with ablate(hf, some_edges(hf, 6 + 10 * seed)), torch.no_grad():
            expected = hf(TOKENS, use_cache=False).logits
            torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)
    torch._dynamo.reset()


def test_a_static_cache_that_was_filled_before_the_cut_is_refused():
    hf = small_llama()
    cache = StaticCache(config=hf.config, max_cache_len=12)
    with torch.no_grad():
        hf(TOKENS[:, :4], cache=cache, use_cache=True)
        with ablate(hf, some_edges(hf, 20)), pytest.raises(UserError, match="filled before these edges were cut"):
            hf(TOKENS[:, 4:], cache=cache, use_cache=True)
