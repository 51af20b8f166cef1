"""Passes as CUDA graphs: a GPU is through with a small pass before Python has launched half of it (layer 1).

A pass that comes again, on a batch of the same size, is recorded once, forward and backward, and from then on replayed
by two calls. What differs from time to time (tokens, mask, what cut edges carry, the gradient that comes back) is
copied to where the recording reads it. Texts are padded on the right to a multiple of `PAD` tokens, which changes
nothing before it, so that batches have few sizes. All recordings share one memory, so one is under way at a time: a
pass between whose forward and backward another one comes leaves that one to be computed as usual.

Shapes: B batch, T position, D width, E edges.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.masked_pass import Pass, is_small

PAD = 8
RECORD_AT = 3  # how often a pass of a size must come to be recorded
MEMORY_SHARE = 0.25  # most of a GPU's memory that all recordings may take, estimated


def record(parts: Sequence[Callable[[], Any]], device: torch.device, pool: Any) -> tuple[list[Any], list[Any]]:
    """Each part as a CUDA graph over the memory of `pool`, and what it returned, into which its replay writes.

    All run once before, aside: what libraries do on their first call only must not be recorded.
    """
    torch.cuda.empty_cache()  # what launched passes left there would be held beside this one's
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for part in parts:
            part()
    torch.cuda.current_stream(device).wait_stream(aside)
    graphs, results = [], []
    for part in parts:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=aside):
            results.append(part())
    return graphs, results


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory


class Recording:
    """One size of batch: the forward, and with `keep` the backward, and the tensors that they read."""

    def __init__(self, model: Any, weights: Tensor, tokens: Tensor, keep: bool, learned: bool, pool: Any) -> None:
        self.tokens, self.weights, self.learned = tokens, weights.clone(), learned
        constants = tuple(None if one is None else one.clone() for one in (model.offsets, model.base))
        self.offsets, self.base = constants
        self.run = Pass(model, self.weights, self.tokens, keep, constants)
        self.gradient = model.embedding.new_zeros(*tokens.shape, model.embedding.shape[1])
        parts = (self._forward, self._backward) if keep else (self._forward,)
        self.graphs, results = record(parts, tokens.device, pool)
        self.read, self.gradients = results[0], results[-1]

    def _forward(self) -> Tensor:
        self.run.read_mask()
        read = self.run.forward().view(*self.tokens.shape, -1)
        if not self.run.keep:
            self.run.release()
        return read

    def _backward(self) -> tuple[Tensor, Tensor | None]:
        return self.run.backward(self.gradient, self.learned)

    def load(self, model: Any, weights: Tensor, tokens: Tensor) -> None:
        """Copy a pass's inputs to where they are read."""
        self.weights.copy_(weights)
        self.tokens[:, : tokens.shape[1]] = tokens
        self.offsets.copy_(model.offsets)
        if self.base is not None:
            self.base.copy_(model.base)


class Replayed:
    """A pass that a recording computes: what `Pass` is to `OutputRead`."""

    def __init__(self, recording: Recording, plain: Callable[[], Pass], length: int) -> None:
        self.recording, self.plain, self.length = recording, plain, length
        self.under_way = False

    def forward(self) -> Tensor:
        """What `output` reads [N, D]."""
        self.recording.graphs[0].replay()
        self.under_way = self.recording.run.keep
        return self.recording.read[:, : self.length].clone().flatten(0, 1)

    def backward(self, gradient: Tensor, means: bool) -> tuple[Tensor, Tensor | None]:
        """As `Pass.backward`; a second one is computed anew, as the memory may be another pass's by then."""
        if not self.under_way:
            return self.plain().backward(gradient, means)
        into = self.recording.gradient
        into[:, : self.length] = gradient.reshape(len(into), self.length, -1)
        into[:, self.length :] = 0
        self.recording.graphs[1].replay()
        self.under_way = False
        at_edges, at_means = self.recording.gradients
        return at_edges.clone(), at_means.clone() if means else None

    def release(self) -> None:
        """Nothing was taken."""


class Replays:
    """The recordings of a model. `on` says whether there are to be any."""

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self.clear()

    def __reduce__(self):  # a copy of a model makes its own
        return Replays, (self.on,)

    def clear(self) -> None:
        """Forget all recordings and give their memory back."""
        self._seen: Counter = Counter()
        self._kept: dict[Any, Recording] = {}
        self._bytes, self._pool, self._last = 0, None, None

    def start(self, model: Any, weights: Tensor, tokens: Tensor, keep: bool, learned: bool) -> Replayed | None:
        """A pass by a recording, with its inputs loaded; None where it is to be computed as usual."""
        if not self.on or not is_small(model, tokens) or model.recompute or self._under_way():
            return None
        if torch.cuda.is_current_stream_capturing():  # the caller records
            return None
        length = tokens.shape[1]
        padded = min(-(-length // PAD) * PAD, model.max_positions)
        if model.offsets.shape[1] > 1:  # means by position
            padded = min(padded, model.offsets.shape[1])
        base = None if model.base is None else model.base.shape
        key = (len(tokens), padded, keep, learned, weights.dtype, model.offsets.shape, base)
        recording = self._kept.get(key) or self._record(key, model, weights, tokens)
        if recording is None:
            return None
        recording.load(model, weights, tokens)
        # for a second backward, by when the mask may be another
        weights, constants = weights.clone() if keep else weights, (model.offsets, model.base)
        run = Replayed(recording, lambda: Pass(model, weights, tokens, keep, constants), length)
        self._last = weakref.ref(run)
        return run

    def _under_way(self) -> bool:
        last = self._last and self._last()
        return last is not None and last.under_way

    def _record(self, key: Any, model: Any, weights: Tensor, tokens: Tensor) -> Recording | None:
        """A new recording, if it is time for one and there is memory for it."""
        self._seen[key] += 1
        if self._seen[key] < RECORD_AT:
            return None
        batch, padded, keep, learned, *_ = key
        rows = 2 * (len(model.graph.sources) + len(model.graph.readers))  # nodes and readers, and about as much again
        needs = rows * batch * padded * model.embedding.shape[1] * model.embedding.element_size()
        most = MEMORY_SHARE * memory_of(tokens.device)
        if needs > most:
            return None
        if self._bytes + needs > most:
            self.clear()
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            recording = Recording(model, weights, tokens.new_zeros(batch, padded), keep, learned, self._pool)
        except RuntimeError:  # no memory, or something in this model that cannot be recorded
            self.clear()
            self.on = False
            return None
        self._bytes += needs
        self._kept[key] = recording
        return recording
