"""What is being chosen for the rows of a matrix: the codes in the making, how they decode, and how long to search."""

from dataclasses import dataclass

import torch

from quantkit.codecs.format import GROUP, SUPERBLOCK, Format, tables


@dataclass(frozen=True)
class Effort:
    """How long to search.

    feedback: carry errors forward (else each block alone). tries: pairs of scale and shift of a codebook type to try
    in each block, best guesses first, None for all. near: neighbours to try of the scale (Q2_K: and the min) of types
    that round each weight alone. passes: coordinate-descent passes over groups; block_passes: so many of them are
    preceded by one over whole blocks, with neighbouring scales. refit: the d (and dmin) of a row jointly.
    """

    feedback: bool
    tries: int | None
    near: int
    passes: int
    block_passes: int = 0
    refit: bool = True


EFFORTS = {
    "fast": Effort(feedback=False, tries=1, near=0, passes=0, refit=False),
    "normal": Effort(feedback=True, tries=2, near=1, passes=1),
    "best": Effort(feedback=True, tries=None, near=1, passes=3, block_passes=2),
}


@dataclass
class State:
    """Codes in the making of E matrices of R rows; see format.Codes. value: v of each weight; q: decoded weights."""

    fmt: Format
    d: torch.Tensor  # [E, R, superblocks]
    dmin: torch.Tensor
    scale: torch.Tensor  # int64 [E, R, blocks]
    offset: torch.Tensor
    entry: torch.Tensor  # int32 [E, R, n / width]
    sign: torch.Tensor  # int32 [E, R, n / 8]
    value: torch.Tensor  # [E, R, n]
    q: torch.Tensor

    @staticmethod
    def empty(fmt: Format, w: torch.Tensor) -> "State":
        """All codes 0, for weights w [E, R, n]."""
        e, r, n = w.shape

        def zeros(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(e, r, count, dtype=dtype, device=w.device)

        return State(
            fmt,
            d=zeros(n // SUPERBLOCK),
            dmin=zeros(n // SUPERBLOCK),
            scale=zeros(n // fmt.block, torch.int64),
            offset=zeros(n // fmt.block, torch.int64),
            entry=zeros(n // fmt.width, torch.int32),
            sign=zeros(n // GROUP, torch.int32),
            value=zeros(n),
            q=zeros(n),
        )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All of it, as `State(fmt, *tensors)` takes it."""
        return [self.d, self.dmin, self.scale, self.offset, self.entry, self.sign, self.value, self.q]

    def rows(self, part: slice) -> "State":
        """Of some rows: views."""
        return State(self.fmt, *(t[:, part] for t in self.tensors))

    def decode(self) -> None:
        """q anew, from d, dmin and the codes."""
        per = SUPERBLOCK // self.fmt.block
        scale, offset = (t.unflatten(-1, (-1, per)) for t in (self.scale, self.offset))
        s, o = block_scale(self.fmt, self.d, self.dmin, scale, offset)
        value = self.value.unflatten(-1, (-1, per, self.fmt.block))
        self.q = torch.addcmul(o[..., None], s[..., None], value).flatten(2)


def block_scale(
    fmt: Format, d: torch.Tensor, dmin: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """s and o of codes [E, N, …] under d, dmin [E, N]."""
    t = tables(fmt, d.device)
    shape = d.shape + (1,) * (scale.ndim - d.ndim)
    s = d.view(shape) * t.multipliers[scale]
    o = -dmin.view(shape) * offset if fmt.n_mins else s * t.shifts[offset]
    return s, o


def near_mins(fmt: Format, near: int) -> int:
    """Neighbours to try of a min code: those finer than Q2_K's are near enough as they were fitted."""
    return near if fmt.n_mins == 16 else 0
