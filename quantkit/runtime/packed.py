"""Matrices as quantized bytes on a device, multiplied there without ever being whole in another form for long."""

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from quantkit.codecs.registry import codec
from quantkit.runtime.activations import FEW, Activations, Halves, use_kernels

if TYPE_CHECKING:
    from quantkit.runtime.run_kernels import Runs

SOME = 64  # rows up to which decoding tiles beats dequantizing a matrix once
MANY = 64  # the same of experts: rows of each in the mean
AT_ONCE = 8192  # pairs of a token and an expert whose products there is memory for in any case
TILE_WEIGHTS = 1 << 24  # dequantized at once for more: they stay in the GPU's cache


def _activations(x: torch.Tensor | Activations) -> Activations:
    return x if isinstance(x, Activations) else Activations(x)


def _in_float32(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x [n, n_in] times weights [n_out, n_in], both bfloat16 on a GPU, whose sums are not rounded to it."""
    return torch.mm(x, weights.T, out_dtype=torch.float32) if x.is_cuda else (x @ weights.T).float()


def _integers(x: Activations) -> Activations:
    if x.words is not None:
        return x
    from quantkit.runtime import step_kernels

    return step_kernels.gated(x.x.float().contiguous(), None)


class Choice(NamedTuple):
    """Which of some matrices rows are multiplied by. ids: int32 [n · k], k for each of n rows; below 0: none, zeros.
    runs: the same, matrix by matrix, where that is quicker."""

    ids: torch.Tensor
    runs: "Runs | None" = None


def choice_of(ids: torch.Tensor, n_matrices: int) -> Choice:
    """ids: int32 [n, k]."""
    flat = ids.flatten()
    if len(ids) <= FEW or 2 * len(flat) < n_matrices or not use_kernels(ids.device.type):
        return Choice(flat)
    from quantkit.runtime import run_kernels

    return Choice(flat, run_kernels.runs(flat, n_matrices))


@cache
def _every(n_matrices: int, n: int, device: torch.device) -> Choice:
    """All matrices in order, n times: shared by all layers, or 64 sequences of R1 take 130 MB. Graphs read it too."""
    ids = torch.arange(n_matrices, dtype=torch.int32, device=device).repeat(n)
    if n <= FEW or not use_kernels(device.type):
        return Choice(ids)
    from quantkit.runtime import run_kernels

    return Choice(ids, run_kernels.every(n_matrices, n, device))


class Packed:
    """n matrices [n_out, n_in] of a type that is `registry.in_groups`.

    data: uint8 [n, n_out, row_bytes] on any device. dtype: of what is dequantized. Results have their input's dtype.
    """

    def __init__(self, qtype: str, data: torch.Tensor, n_in: int, dtype: torch.dtype):
        self.qtype, self.data, self.n_in, self.dtype = qtype, data, n_in, dtype

    def __len__(self) -> int:
        return len(self.data)

    @property
    def n_bytes(self) -> int:
        """Quantized, as they are held."""
        return self.data.nbytes

    def dense(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Matrices begin ... end, dequantized: [end - begin, n_out, n_in]."""
        data = self.data[begin:end]
        if not use_kernels(data.device.type):
            return codec(self.qtype).dequantize(data).to(self.dtype)
        from quantkit.runtime import kernels

        out = torch.empty(*data.shape[:2], self.n_in, dtype=self.dtype, device=data.device)
        kernels.dequantize(self.qtype, data.flatten(0, 1), out.view(-1, self.n_in))
        return out

    def part(self, begin: int, end: int) -> "Packed":
        """Matrices begin ... end as they are."""
        return Packed(self.qtype, self.data[begin:end], self.n_in, self.dtype)

    def __call__(self, x: torch.Tensor | Activations) -> torch.Tensor:
        """The first matrix: x [n, n_in] -> [n, n_out]."""
        x = _activations(x)
        if len(x.x) <= (SOME if use_kernels(x.x.device.type) else FEW):
            return self._products(x).to(x.x.dtype)
        if x.x.dtype == self.dtype:
            return x.x @ self.dense(0, 1)[0].T
        rows, n = x.x.to(self.dtype), max(1, TILE_WEIGHTS // self.n_in)
        tiles = (Packed(self.qtype, part[None], self.n_in, self.dtype).dense()[0] for part in self.data[0].split(n))
        return torch.cat([_in_float32(rows, tile) for tile in tiles], dim=1)

    def each(self, x: Activations) -> torch.Tensor:
        """x [n · n_matrices, n_in], every matrix its own -> [n, n_matrices, n_out]."""
        n_matrices = len(self.data)
        n = len(x.x) // n_matrices
        return self._products(x, _every(n_matrices, n, x.x.device)).view(n, n_matrices, -1)

    def chosen(self, x: Activations, choice: Choice) -> torch.Tensor:
        """x [n, n_in] -> [n · k, n_out]."""
        return self._products(x, choice)

    def choice(self, ids: torch.Tensor) -> Choice:
        """ids: int32 [n, k]."""
        return choice_of(ids, len(self))

    def by_tiles(self, pairs: int) -> bool:
        """Whether so many pairs of a token and one of these are multiplied by decoding tiles."""
        return use_kernels(self.data.device.type) and pairs <= MANY * len(self)

    def experts(
        self, up: "Packed", down: "Packed", x: torch.Tensor, order: torch.Tensor, stops: torch.Tensor, k: int
    ) -> torch.Tensor:
        """These as gate: for pairs in this order, int64 [m], k neighbours of which share a row of x [n, d], and those
        of each expert end at stops int32 -> float32 [m, d]."""
        from quantkit.runtime import run_kernels

        runs = run_kernels.sorted_runs(order.int(), stops, k)
        rows = run_kernels.halves(x)
        if self._like(up):
            first, second = self._tiles(rows, runs, up.data)
        else:
            first, second = self._tiles(rows, runs), up._tiles(rows, runs)
        return down._tiles(run_kernels.halves(first, second), runs._replace(order=None, share=1))

    def beside(
        self, other: "Matrix", x: Activations, choice: Choice | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Products with this and another one, as `chosen` (without a choice as a call): at once if they are alike."""
        some = choice is not None or len(x.x) <= SOME
        if isinstance(other, Packed) and some and self._like(other) and use_kernels(self.data.device.type):
            first, second = self._by_kernels(x, choice, other.data)
            return first, second
        if choice is None:
            return self(x), other(x)
        assert isinstance(other, Packed)
        return self.chosen(x, choice), other.chosen(x, choice)

    def _like(self, other: "Packed") -> bool:
        return (self.qtype, self.data.shape) == (other.qtype, other.data.shape)

    def _by_kernels(self, x: Activations, choice: Choice | None, second: torch.Tensor | None = None) -> torch.Tensor:
        if choice.runs if choice else len(x.x) > FEW:
            from quantkit.runtime import run_kernels

            runs = choice and choice.runs
            runs = runs and runs._replace(share=runs.pairs // len(x.x))
            return self._tiles(x.halves or run_kernels.halves(x.x), runs, second)
        from quantkit.runtime import kernels

        return kernels.products(self.qtype, self.data, _integers(x), choice and choice.ids, second)

    def _tiles(self, x: Halves, runs: "Runs | None", second: torch.Tensor | None = None) -> torch.Tensor:
        from quantkit.runtime import kernels, mma_kernels, run_kernels, tile_kernels

        matrices = kernels.matrices(self.qtype, self.data, self.n_in, self.n_in % 256 == 0, second)
        way = mma_kernels if mma_kernels.able(matrices, (runs or run_kernels.pairs_of(x)).tokens) else tile_kernels
        return way.products(matrices, x, runs, second)

    def _products(self, x: Activations, choice: Choice | None = None) -> torch.Tensor:
        if use_kernels(x.x.device.type):
            return self._by_kernels(x, choice)
        rows = x.x.float()
        if choice is None:
            return rows @ codec(self.qtype).dequantize(self.data[0]).T
        used, at = choice.ids.clamp_min(0).unique(return_inverse=True)
        weights = codec(self.qtype).dequantize(self.data[used.long()])
        products = torch.einsum("pi,poi->po", rows.repeat_interleave(len(choice.ids) // len(rows), 0), weights[at])
        return products.masked_fill_((choice.ids < 0)[:, None], 0)


class Plain:
    """As Packed, of matrices that are kept dequantized: [n, n_out, n_in]."""

    def __init__(self, weights: torch.Tensor):
        self.weights = weights

    @property
    def n_bytes(self) -> int:
        """As they are held."""
        return self.weights.nbytes

    def dense(self, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Matrices begin ... end."""
        return self.weights[begin:end]

    def __call__(self, x: torch.Tensor | Activations) -> torch.Tensor:
        x = _activations(x).x
        return (x.to(self.weights.dtype) @ self.weights[0].T).to(x.dtype)

    def each(self, x: Activations) -> torch.Tensor:
        """x [n · n_matrices, n_in], every matrix its own -> [n, n_matrices, n_out]."""
        rows = x.x.view(-1, len(self.weights), self.weights.shape[-1])
        return torch.einsum("nmi,moi->nmo", rows.to(self.weights.dtype), self.weights).to(rows.dtype)

    def beside(self, other: "Matrix", x: Activations) -> tuple[torch.Tensor, torch.Tensor]:
        """Products with this and another one."""
        return self(x), other(x)


Matrix = Packed | Plain
