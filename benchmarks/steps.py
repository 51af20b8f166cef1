"""What the benchmarks share: models of known shapes with random weights, and one step of each kind.

A step is a forward over the batch and a backward from its next-token loss: to the mask for the engine, to the
embeddings for plain Hugging Face. `settings` are a script's own, with shape, batch, length, device and dtype, and for
the engine split_qkv and gradient_checkpointing.
"""

import copy
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.errors import UserError
from circuit_breaking.runs import cost
from circuit_breaking.runs.config import check_choice
from circuit_breaking.runs.devices import pick_device, pick_dtype
from circuit_breaking.tasks.losses import cross_entropy_of_hidden

THREE_LAYERS = {"num_hidden_layers": 3, "vocab_size": 32000, "bos_token_id": 0, "eos_token_id": 0}
# name -> family (Hugging Face's `model_type`) and its configuration, where that differs from the family's default
SHAPES_OF = {
    "tiny": ("gpt2", {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0,
    }),
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_layer": 24, "n_head": 16, "n_embd": 1024}),
    "gpt2-large": ("gpt2", {"n_layer": 36, "n_head": 20, "n_embd": 1280}),
    "gpt2-xl": ("gpt2", {"n_layer": 48, "n_head": 25, "n_embd": 1600}),
    "pythia-70m": ("gpt_neox", {
        "num_hidden_layers": 6, "num_attention_heads": 8, "hidden_size": 512, "intermediate_size": 2048,
        "vocab_size": 50304,
    }),
    "pythia-160m": ("gpt_neox", {
        "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072,
        "vocab_size": 50304,
    }),
    "pythia-410m": ("gpt_neox", {
        "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_size": 1024, "intermediate_size": 4096,
        "vocab_size": 50304,
    }),
    "smollm2-135m": ("llama", {
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    }),
    "qwen2.5-0.5b": ("qwen2", {
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "qwen3-0.6b": ("qwen3", {
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 1024,
        "head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "tie_word_embeddings": True,
    }),
    "gemma-3-270m": ("gemma3_text", {
        "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 640,
        "head_dim": 256, "intermediate_size": 2048, "vocab_size": 262144, "sliding_window": 512,
    }),
    # the true layers of larger models, three of them, with a vocabulary of 32,000
    "gemma-2b, 3 layers": ("gemma", {
        **THREE_LAYERS, "num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 2048, "head_dim": 256,
        "intermediate_size": 16384,
    }),
    "gemma-2-2b, 3 layers": ("gemma2", {
        **THREE_LAYERS, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304, "head_dim": 256,
        "intermediate_size": 9216,
    }),
    "olmo-2-1b, 3 layers": ("olmo2", {
        **THREE_LAYERS, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_size": 2048,
        "intermediate_size": 8192, "rms_norm_eps": 1e-6,
    }),
    "granite-3.3-2b, 3 layers": ("granite", {
        **THREE_LAYERS, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 2048,
        "intermediate_size": 8192, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22, "logits_scaling": 8.0,
    }),
    "phi-3.5-mini, 3 layers": ("phi3", {
        **THREE_LAYERS, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 3072,
        "intermediate_size": 8192, "pad_token_id": 0,
    }),
}  # fmt: skip
# larger models, for which memory is computed, and measured with fewer layers
LARGE_OF = {
    "pythia-6.9b": ("gpt_neox", {
        "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096, "intermediate_size": 16384,
        "vocab_size": 50432,
    }),
    "gemma-2-2b": ("gemma2", {
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 2304,
        "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000,
    }),
    "llama-3.1-8b": ("llama", {
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
        "intermediate_size": 14336, "vocab_size": 128256,
    }),
}  # fmt: skip
SHAPES, LARGE = (
    {name: AutoConfig.for_model(family, **options) for name, (family, options) in shapes.items()}
    for shapes in (SHAPES_OF, LARGE_OF)
)

Step = Callable[[torch.Tensor], None]
WARM_ON_GPU = 5  # steps until kernels are chosen and a pass is recorded as a CUDA graph


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process, in which nothing else uses memory.

    Raises:
        UserError: that process was ended, as the system does if memory is short.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                "the process that measures was ended, probably because memory is short. Choose a smaller model or "
                "fewer texts."
            ) from None


def check_shapes(*shapes: str, large: bool = False) -> None:
    """Raise a `UserError` for a name that is not in `SHAPES` or, if `large`, in `LARGE` either."""
    for shape in shapes:
        check_choice("shape", shape, SHAPES | LARGE if large else SHAPES)


def make_hf(settings: Any) -> nn.Module:
    """A model of `settings.shape` with random weights, and with `settings.layers` layers if that is set."""
    return make_hf_of(config_of(settings), settings.device, settings.dtype)


def config_of(settings: Any) -> PreTrainedConfig:
    """The configuration of `settings.shape`, with `settings.layers` layers if that is set."""
    config, layers = (SHAPES | LARGE)[settings.shape], getattr(settings, "layers", 0)
    if layers and layers != config.num_hidden_layers:
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def make_hf_of(config: PreTrainedConfig, device: str, dtype: str) -> nn.Module:
    """A model of a configuration with random weights."""
    torch.manual_seed(0)
    with torch.device(pick_device(device)):
        return AutoModelForCausalLM.from_config(config, dtype=pick_dtype(dtype)).eval()


def make_engine(settings: Any) -> EdgeMaskedTransformer:
    """The engine on such a model."""
    return load_model(
        make_hf(settings),
        settings.split_qkv,
        settings.device,
        settings.dtype,
        gradient_checkpointing=settings.gradient_checkpointing,
        share_weights=True,  # the Hugging Face model is not kept
    )


def make_tokens(settings: Any) -> torch.Tensor:
    """Random tokens [batch, length] of the vocabulary of `settings.shape`."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, config_of(settings).vocab_size, (settings.batch, settings.length), generator=generator)
    return tokens.to(pick_device(settings.device))


def seconds(step: Step, tokens: torch.Tensor, computed: bool = False) -> float:
    """Duration of one step; with `computed`, the CPU time of this process, which the work of others hardly changes."""
    clock = time.process_time if computed else time.perf_counter
    start = clock()
    step(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def times_of(
    steps: Mapping[str, Step], tokens: torch.Tensor, rounds: int, computed: bool = False
) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each variant; `computed` as for `seconds`.

    The variants take turns, so that other load slows all of them.
    """
    warm = WARM_ON_GPU if tokens.is_cuda else 1
    times = [{name: seconds(step, tokens, computed) for name, step in steps.items()} for _ in range(rounds + warm)]
    return {name: [row[name] for row in times[warm:]] for name in steps}


def added_at_peak(step: Step, tokens: torch.Tensor) -> float:
    """Peak memory of one step beyond what is in use before it, GB. On a CPU, call it in a fresh process."""
    if tokens.is_cuda:  # reserved memory, because the memory of a CUDA graph does not count as allocated
        torch.cuda.empty_cache()
        base = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(WARM_ON_GPU):
            step(tokens)
        return (torch.cuda.max_memory_reserved() - base) / 1e9
    return cost.added_at_peak(partial(step, tokens))


def plain_step(hf: nn.Module, compiled: bool = False) -> Step:
    """Plain Hugging Face, with the gradient of the embeddings; `compiled` by torch.compile."""
    hf.requires_grad_(False)
    forward = torch.compile(hf) if compiled else hf

    def step(tokens: torch.Tensor) -> None:
        embeddings = hf.get_input_embeddings()(tokens).requires_grad_()
        logits = forward(inputs_embeds=embeddings).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    return step


def engine_step(
    model: EdgeMaskedTransformer, mask: torch.Tensor, compiled: bool = False, counterfactual: bool = False
) -> Step:
    """The engine with a given mask; `compiled` by torch.compile as far as possible.

    With `counterfactual`, cut edges carry what their source writes on other texts, which are new in every step.
    """
    mask = mask.to(model.mask.weights).requires_grad_()
    forward = torch.compile(model.hidden) if compiled else model.hidden
    numbers = itertools.count()

    def step(tokens: torch.Tensor) -> None:
        others = tokens.flip(1) if next(numbers) % 2 else tokens.roll(1, 1)
        with model.resampling(others) if counterfactual else nullcontext():
            hidden = forward(tokens, mask=mask)[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        cross_entropy_of_hidden(
            hidden, model.unembedding, model.unembedding_bias, targets, model.head
        ).mean().backward()

    return step


def binary_mask(n_edges: int, cut: int) -> torch.Tensor:
    """A mask as it is saved: `cut` edges have weight 0, all others 1."""
    mask = torch.ones(n_edges)
    mask[torch.randperm(n_edges, generator=torch.Generator().manual_seed(0))[:cut]] = 0.0
    return mask


def dense_mask(n_edges: int) -> torch.Tensor:
    """A mask as training starts with: every weight is between 0 and 1."""
    return torch.empty(n_edges).uniform_(0.9, 0.999, generator=torch.Generator().manual_seed(0))


def medians(
    hf: nn.Module, engine: EdgeMaskedTransformer, tokens: torch.Tensor, cut: int, rounds: int, computed: bool = False
) -> dict[str, float]:
    """Median seconds of a plain step, of one with a binary mask that cuts `cut` edges, and of one with any mask;
    `computed` as for `seconds`."""
    steps = {
        "plain": plain_step(hf),
        "binary": engine_step(engine, binary_mask(len(engine.graph), cut)),
        "any": engine_step(engine, dense_mask(len(engine.graph))),
    }
    return {name: statistics.median(values) for name, values in times_of(steps, tokens, rounds, computed).items()}
