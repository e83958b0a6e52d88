"""Matrices as quantized bytes on a device, multiplied there without ever being whole in another form for long."""

from functools import cache

import torch

from quantkit.codecs.registry import codec
from quantkit.runtime.activations import Activations, use_kernels

FEW = 3  # rows up to which decoding in registers beats dequantizing once: it takes as long for each of them
TILE_WEIGHTS = 1 << 24  # dequantized at once for a few rows more: they stay in the GPU's cache


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


@cache
def _every(n_matrices: int, n: int, device: torch.device) -> torch.Tensor:
    """All matrices in order, n times: shared by all layers, or 64 sequences of R1 take 130 MB. Graphs read it too."""
    return torch.arange(n_matrices, dtype=torch.int32, device=device).repeat(n)


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
        if len(x.x) <= FEW:
            return self._products(x, None).to(x.x.dtype)
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

    def chosen(self, x: Activations, ids: torch.Tensor) -> torch.Tensor:
        """x [n, n_in], ids int32 [n · k] of matrices, k for each row -> [n · k, n_out]; zeros where ids is below 0."""
        return self._products(x, ids)

    def beside(
        self, other: "Matrix", x: Activations, ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Products with this and another one, as `chosen` (without ids as a call): at once if they are alike."""
        few = ids is not None or len(x.x) <= FEW
        if isinstance(other, Packed) and few and self._like(other) and use_kernels(self.data.device.type):
            from quantkit.runtime import kernels

            first, second = kernels.products(self.qtype, self.data, _integers(x), ids, other.data)
            return first, second
        if ids is None:
            return self(x), other(x)
        assert isinstance(other, Packed)
        return self.chosen(x, ids), other.chosen(x, ids)

    def _like(self, other: "Packed") -> bool:
        return (self.qtype, self.data.shape) == (other.qtype, other.data.shape)

    def _products(self, x: Activations, ids: torch.Tensor | None) -> torch.Tensor:
        if use_kernels(x.x.device.type):
            from quantkit.runtime import kernels

            return kernels.products(self.qtype, self.data, _integers(x), ids)
        rows = x.x.float()
        if ids is None:
            return rows @ codec(self.qtype).dequantize(self.data[0]).T
        used, at = ids.clamp_min(0).unique(return_inverse=True)
        weights = codec(self.qtype).dequantize(self.data[used.long()])
        products = torch.einsum("pi,poi->po", rows.repeat_interleave(len(ids) // len(rows), 0), weights[at])
        return products.masked_fill_((ids < 0)[:, None], 0)


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
