"""The ggml types: blocks of weights, their bytes, bits per weight (bpw), and what each was measured to do.

The one home of a type's sizes. How its bytes are laid out, packed and decoded: `registry.codec(name)`.
"""

from dataclasses import dataclass
from functools import cache

import gguf

from quantkit.codecs.foreign import FOREIGN
from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class QType:
    """One ggml type. A row of n weights is n / block_size blocks of type_size bytes; blocks never cross rows.

    importance: True where the encoder is only usable with an imatrix (llama-quantize refuses these without one).
    error: relative root mean square error of ggml's encoder (unit importance) on 64 rows of 2048 normal weights.
    damage: of a model in it, as a multiple of Q4_K's (scripts/research/fit_prior.py); 0: nothing can be seen.
    gamma: factor on the scales of routed experts that undoes how least squares shrinks what it rounds coarsely.
    row_meta: bytes of a row beside its blocks, which only types of others have.
    """

    name: str
    block_size: int
    type_size: int
    importance: bool = False
    error: float = 0.0
    damage: float = 0.0
    gamma: float = 1.0
    row_meta: int = 0

    @property
    def bpw(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.type_size / self.block_size

    def fits(self, n_in: int) -> bool:
        """Whether rows of n_in weights divide into whole blocks."""
        return n_in % self.block_size == 0

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights; QuantkitError if it does not divide into blocks."""
        if not self.fits(n_in):
            raise QuantkitError(f"a row of {n_in} weights does not divide into {self.name} blocks of {self.block_size}")
        return self.row_meta + n_in // self.block_size * self.type_size


def _qtype(name: str, importance: bool = False, error: float = 0.0, damage: float = 0.0, gamma: float = 1.0) -> QType:
    return QType(name, *gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]], importance, error, damage, gamma)


# From the fewest bits to the most, so that every list a person reads comes in that order.
_ENCODED = (
    _qtype("IQ1_S", importance=True, error=0.486, damage=29.3, gamma=1.06),
    _qtype("IQ1_M", importance=True, error=0.452, damage=26.2, gamma=1.06),
    _qtype("IQ2_XXS", importance=True, error=0.344, damage=15.9, gamma=1.06),
    _qtype("IQ2_XS", importance=True, error=0.300, damage=11.8, gamma=1.06),
    _qtype("IQ2_S", importance=True, error=0.249, damage=8.53, gamma=1.06),
    _qtype("Q2_K", error=0.297, damage=9.74, gamma=1.03),
    _qtype("IQ3_XXS", importance=True, error=0.182, damage=4.90),
    _qtype("IQ3_S", error=0.166, damage=3.50),
    _qtype("Q3_K", error=0.151, damage=3.61),
    _qtype("IQ4_XS", error=0.0768, damage=1.15),
    _qtype("MXFP4", error=0.1147, damage=2.6),  # what FP4 weights are copied into; damage likewise
    _qtype("IQ4_NL", error=0.0762, damage=1.11),
    _qtype("Q4_K", error=0.0716, damage=1.00),
    _qtype("Q4_0", error=0.0817, damage=1.3),  # what INT4 weights are copied into; damage by its error, where encoded
    _qtype("Q5_0", error=0.0410, damage=0.38),  # its damage and Q5_1's by their errors, among the others'
    _qtype("Q5_K", error=0.0363, damage=0.309),
    _qtype("Q5_1", error=0.0343, damage=0.28),
    _qtype("Q6_K", error=0.0178, damage=0.097),
    _qtype("Q8_0", error=0.00536, damage=0.015),
    _qtype("F16", error=0.000207),  # the checkpoint is FP8 or BF16: what these three lose is not seen
    _qtype("BF16", error=0.00166),
    _qtype("F32"),
)
QTYPES = {qtype.name: qtype for qtype in _ENCODED}
"""The types that quantkit encodes, by name."""

TABLE = _qtype("I32")
"""Of numbers that are no weights (ids of experts): only the format asks for it, no recipe can."""


def get(name: str) -> QType:
    """A type that quantkit encodes, or TABLE; QuantkitError with their names for anything else."""
    if name == TABLE.name:
        return TABLE
    try:
        return QTYPES[name]
    except (KeyError, TypeError):
        raise QuantkitError(f"unknown type {name!r}; quantkit encodes {' '.join(QTYPES)}") from None


@cache
def stored(name: str) -> QType:
    """Any type that a GGUF file may hold, those that quantkit only reads or only counts included; QuantkitError for
    other names."""
    if name in gguf.GGMLQuantizationType.__members__:
        return QTYPES.get(name) or _qtype(name)
    if name not in FOREIGN:
        raise QuantkitError(f"unknown ggml type {name}")
    found = FOREIGN[name]
    return QType(name, found.block_size, found.type_size, row_meta=found.row_meta)


def needs_importance(name: str) -> bool:
    """Whether the encoder of this type is only usable with an imatrix."""
    return get(name).importance


def fits(name: str, n_in: int) -> bool:
    """Whether rows of n_in weights divide into whole blocks of a type that quantkit encodes."""
    return get(name).fits(n_in)


def row_bytes(name: str, n_in: int) -> int:
    """Bytes of a row of n_in weights of a type that quantkit encodes; QuantkitError if it is not whole blocks."""
    return get(name).row_bytes(n_in)
