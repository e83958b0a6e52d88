"""A CUDA graph of work on tensors of fixed shapes: few rows need as many launches as many rows, and little else."""

from collections.abc import Callable

import torch

Work = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""What is done over and over to tensors of the same shapes."""


class Recorded:
    """`work`, recorded once and replayed on whatever is copied into the tensors that it was recorded with.

    It must not wait for the GPU nor branch by what it computes; what it holds on to must outlive this.
    """

    def __init__(self, work: Work, like: list[torch.Tensor]):
        self.taken = [t.clone(memory_format=torch.contiguous_format) for t in like]
        self.stream = torch.cuda.Stream(like[0].device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            work(self.taken)  # compiles, and derives what is kept
        torch.cuda.current_stream().wait_stream(self.stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.given = work(self.taken)

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """As `Work`."""
        for mine, t in zip(self.taken, tensors, strict=True):
            mine.copy_(t)
        self.graph.replay()
        return self.given
