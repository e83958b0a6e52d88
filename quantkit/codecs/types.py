"""The ggml types that quantkit encodes: blocks of weights, their bytes, bits per weight (bpw)."""

from dataclasses import dataclass

import gguf

from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class QType:
    """One ggml type. A row of n weights is n / block_size blocks of type_size bytes; blocks never cross rows.

    importance: True where the encoder is only usable with an imatrix (llama-quantize refuses these without one).
    """

    name: str
    ggml_id: int
    block_size: int
    type_size: int
    importance: bool

    @property
    def bpw(self) -> float:
        return 8 * self.type_size / self.block_size


# From the fewest bits to the most, so that every list a person reads comes in that order.
ENCODED = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL"),
    *("Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16", "F32"),
)
IMPORTANCE = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"))


def _qtype(name: str) -> QType:
    ggml = gguf.GGMLQuantizationType[name]
    block_size, type_size = gguf.GGML_QUANT_SIZES[ggml]
    return QType(name, int(ggml), block_size, type_size, name in IMPORTANCE)


QTYPES = {name: _qtype(name) for name in ENCODED}


def get(name: str) -> QType:
    try:
        return QTYPES[name]
    except (KeyError, TypeError):
        raise QuantkitError(f"unknown type {name!r}; quantkit encodes {' '.join(QTYPES)}") from None


def needs_importance(name: str) -> bool:
    return get(name).importance


def fits(name: str, n_in: int) -> bool:
    """Whether rows of n_in weights divide into whole blocks."""
    return n_in % get(name).block_size == 0


def row_bytes(name: str, n_in: int) -> int:
    qtype = get(name)
    if n_in % qtype.block_size:
        raise QuantkitError(f"a row of {n_in} weights does not divide into {name} blocks of {qtype.block_size}")
    return n_in // qtype.block_size * qtype.type_size
