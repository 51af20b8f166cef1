"""Small passes on a GPU as CUDA graphs.

Small passes are bound by the time Python takes to launch kernels. A pass that comes again with a batch of the same size
is captured once, forward and backward, and from then on replayed by two calls. What differs from time to time (tokens,
mask, ablation values, the incoming gradient) is copied to the addresses that the captured kernels read.

Texts are padded on the right to a multiple of `PAD` tokens, which changes nothing before the padding, so that batches
have few sizes. All captured passes share one memory pool, so one is in use at a time: a pass that starts between the
forward and the backward of another is launched as usual.

Shapes: B batch, T position, D width, E edges.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import AblationValues
from circuit_breaking.engine.masked_pass import MaskedPass
from circuit_breaking.engine.network import Network, PassInputs, Rotary, Workspace
from circuit_breaking.engine.reads import product_is_small
from circuit_breaking.errors import first_line

PAD = 8
CAPTURE_AT = 3  # how often a pass of one size must come before it is captured
MEMORY_SHARE = 0.25  # most of a GPU's memory that all captured passes may take, estimated


def capture(parts: Sequence[Callable[[], Any]], device: torch.device, pool: Any) -> tuple[list[Any], list[Any]]:
    """Capture each part as a CUDA graph over the memory of `pool`; also what it returned, which its replay overwrites.

    All parts run once before, on a side stream: what libraries do on their first call only must not be captured.
    """
    torch.cuda.empty_cache()  # cached memory of launched passes would be kept beside the pool's
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for part in parts:
            part()
    torch.cuda.current_stream(device).wait_stream(side)
    graphs, results = [], []
    for part in parts:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, stream=side):
            results.append(part())
    return graphs, results


def memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory."""
    return torch.cuda.get_device_properties(device).total_memory


def copy_of(values: AblationValues) -> AblationValues:
    """Ablation values in memory of their own."""
    sums = values.mean_prefix_sums
    return AblationValues(values.bias_minus_mean.clone(), None if sums is None else sums.clone(), values.n_read)


class CapturedPass:
    """A captured forward for one size of batch, with its backward if `backward`, and the tensors that they read."""

    def __init__(
        self, network: Network, inputs: PassInputs, workspace: Workspace, backward: bool, constants: bool, pool: Any
    ) -> None:
        self.inputs = replace(inputs, mask=inputs.mask.clone(), values=copy_of(inputs.values))
        self.constants = constants
        self.run = MaskedPass(network, self.inputs, workspace, backward)
        self.gradient = network.embedding.new_zeros(*inputs.tokens.shape, network.embedding.shape[1])
        parts = (self._forward, self._backward) if backward else (self._forward,)
        self.graphs, results = capture(parts, inputs.tokens.device, pool)
        self.read, self.gradients = results[0], results[-1]

    def _forward(self) -> Tensor:
        self.run.read_mask()
        read = self.run.forward().view(*self.inputs.tokens.shape, -1)
        if not self.run.save_for_backward:
            self.run.release()
        return read

    def _backward(self) -> tuple[Tensor, Tensor | None]:
        return self.run.backward(self.gradient, edges=True, constants=self.constants)

    def load(self, inputs: PassInputs) -> None:
        """Copy the inputs of a pass to the addresses that the captured kernels read."""
        mine = self.inputs
        mine.mask.copy_(inputs.mask)
        mine.tokens[:, : inputs.tokens.shape[1]] = inputs.tokens
        mine.values.bias_minus_mean.copy_(inputs.values.bias_minus_mean)
        if mine.values.mean_prefix_sums is not None:
            mine.values.mean_prefix_sums.copy_(inputs.values.mean_prefix_sums)


class ReplayedPass:
    """A pass that a captured one computes; it has the methods of `MaskedPass` that `MaskedForward` uses.

    Args:
        captured: the captured pass, with this pass's inputs loaded.
        launched: makes the same pass as a `MaskedPass`.
        length: T of this pass, which the captured one may exceed by padding.
    """

    def __init__(self, captured: CapturedPass, launched: Callable[[], MaskedPass], length: int) -> None:
        self.captured, self.launched, self.length = captured, launched, length
        self.in_use = False

    def forward(self) -> Tensor:
        """What `output` reads [N, D]."""
        self.captured.graphs[0].replay()
        self.in_use = self.captured.run.save_for_backward
        return self.captured.read[:, : self.length].clone().flatten(0, 1)

    def backward(self, gradient: Tensor, edges: bool, constants: bool) -> tuple[Tensor | None, Tensor | None]:
        """As `MaskedPass.backward`; a second one is launched, since another pass may be using the memory by then."""
        if not self.in_use:
            return self.launched().backward(gradient, edges, constants)
        into = self.captured.gradient
        into[:, : self.length] = gradient.reshape(len(into), self.length, -1)
        into[:, self.length :] = 0
        self.captured.graphs[1].replay()
        self.in_use = False
        grad_edges, grad_constants = self.captured.gradients
        return grad_edges.clone() if edges else None, grad_constants.clone() if constants else None

    def release(self) -> None:
        """Nothing was taken from the workspace."""


class CudaGraphCache:
    """The captured passes of a model. `enabled` says whether there are to be any."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.clear()

    def __reduce__(self):  # a copy of a model captures its passes again
        return CudaGraphCache, (self.enabled,)

    def clear(self) -> None:
        """Drop all captured passes and free their memory."""
        self._seen: Counter = Counter()
        self._kept: dict[Any, CapturedPass] = {}
        self._bytes, self._pool, self._last = 0, None, None

    def usable(self, network: Network, tokens: Tensor) -> bool:
        """Whether a pass over these tokens may be captured or replayed now."""
        if not self.enabled or not product_is_small(network, tokens) or network.gradient_checkpointing:
            return False
        last = self._last and self._last()
        if last is not None and last.in_use:
            return False
        return not torch.cuda.is_current_stream_capturing()  # the caller captures

    def replay(
        self,
        network: Network,
        inputs: PassInputs,
        workspace: Workspace,
        backward: bool,
        constants: bool,
        max_positions: int,
        rotary_tables: Callable[[int, torch.device], Rotary | None],
    ) -> ReplayedPass | None:
        """A pass that replays a captured one, with its inputs loaded; None if it has to be launched as usual.

        Args:
            network, inputs, workspace: as for `MaskedPass`.
            backward: whether a backward will follow; constants: whether that gives ablation constants a gradient.
            max_positions: positions of the model, beyond which nothing is padded.
            rotary_tables: makes the tables of cos and sin for a given number of positions.
        """
        tokens, values = inputs.tokens, inputs.values
        padded = min(-(-tokens.shape[1] // PAD) * PAD, max_positions)
        if values.bias_minus_mean.shape[1] > 1:  # means by position
            padded = min(padded, values.bias_minus_mean.shape[1])
        sums = None if values.mean_prefix_sums is None else values.mean_prefix_sums.shape
        early = min(inputs.ablate_from, padded)
        key = (len(tokens), padded, backward, constants, inputs.mask.dtype, values.bias_minus_mean.shape, sums, early)
        captured = self._kept.get(key)
        if captured is None:
            self._seen[key] += 1
            if self._seen[key] < CAPTURE_AT:
                return None
            zeros = tokens.new_zeros(len(tokens), padded)
            static = replace(inputs, tokens=zeros, rotary=rotary_tables(padded, tokens.device))
            captured = self._capture(key, network, static, workspace, backward, constants)
            if captured is None:
                return None
        captured.load(inputs)
        # the caller may change the mask before a second backward
        again = replace(inputs, mask=inputs.mask.clone()) if backward else inputs
        run = ReplayedPass(captured, lambda: MaskedPass(network, again, workspace, backward), tokens.shape[1])
        self._last = weakref.ref(run)
        return run

    def _capture(
        self, key: Any, network: Network, inputs: PassInputs, workspace: Workspace, backward: bool, constants: bool
    ) -> CapturedPass | None:
        """A new captured pass, if there is memory for it."""
        graph, embedding = network.graph, network.embedding
        rows = 2 * (len(graph.sources) + len(graph.readers))  # nodes and readers, and about as much again
        needs = rows * inputs.tokens.numel() * embedding.shape[1] * embedding.element_size()
        most = MEMORY_SHARE * memory_of(inputs.tokens.device)
        if needs > most:
            return None
        if self._bytes + needs > most:
            self.clear()
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            captured = CapturedPass(network, inputs, workspace, backward, constants, self._pool)
        except RuntimeError as error:  # no memory, or an operation that cannot be captured
            self.clear()
            self.enabled = False
            warnings.warn(
                f"a pass could not be captured as a CUDA graph ({first_line(error)}). This model runs without CUDA "
                "graphs from here on: slower for small batches, the same numbers.",
                stacklevel=2,
            )
            return None
        self._bytes += needs
        self._kept[key] = captured
        return captured
