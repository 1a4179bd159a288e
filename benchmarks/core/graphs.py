"""Calls of a function as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Captured:
    """Replays a function of fixed tensors as a CUDA graph, captured at the first call.

    Some calls precede the capture: in them cuDNN searches its algorithms and the op checks its kernels, which a capture
    forbids. Every call overwrites and returns the same tensor.
    """

    def __init__(self, function: Callable[[], Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output = torch.empty(0)

    def __call__(self) -> Tensor:
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        return self._output

    def _capture(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self._function()
        return graph
