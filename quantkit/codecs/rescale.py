"""New superblock scales in bytes that are already packed: everything else in the block stays as it is."""

import numpy as np

from quantkit.codecs.format import FP16_MAX, SUPERBLOCK

# Bytes of a superblock, and where its float16 scales stand (ggml-common.h): d, or d and dmin.
SCALES = {
    "IQ1_S": (50, (0,)),
    "IQ2_XXS": (66, (0,)),
    "IQ2_XS": (74, (0,)),
    "IQ2_S": (82, (0,)),
    "IQ3_XXS": (98, (0,)),
    "IQ3_S": (110, (0,)),
    "IQ4_XS": (136, (0,)),
    "Q2_K": (84, (80, 82)),
    "Q3_K": (110, (108,)),
    "Q4_K": (144, (0, 2)),
    "Q5_K": (176, (0, 2)),
    "Q6_K": (210, (208,)),
}
IQ1_M_BYTES, IQ1_M_SCALES = 56, 48  # d is spread over the high nibbles of four words of scales
RESCALABLE = frozenset(SCALES) | {"IQ1_M"}


def rescale(qtype: str, data: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """data uint8 [..., row_bytes] with all scales of each superblock times factor float32 [..., n_in / 256].

    Scales are rounded to float16 and kept in its range. Returns new bytes; raises KeyError for other types.
    """
    size = IQ1_M_BYTES if qtype == "IQ1_M" else SCALES[qtype][0]
    blocks = data.reshape(-1, size).copy()
    by = factor.reshape(-1)
    if len(by) != len(blocks):
        raise ValueError(f"{len(by)} factors for {len(blocks)} superblocks of {SUPERBLOCK} weights")
    if qtype == "IQ1_M":
        words = blocks[:, IQ1_M_SCALES:].copy().view("<u2").astype(np.uint32)
        shifts = np.array([12, 8, 4, 0], np.uint32)  # word i holds bits 4 i .. 4 i + 3 of d
        d = ((words & 0xF000) >> shifts).sum(1).astype("<u2").view(np.float16)
        new = _times(d, by).view("<u2").astype(np.uint32)
        nibbles = (new[:, None] << shifts) & 0xF000
        blocks[:, IQ1_M_SCALES:] = ((words & 0x0FFF) | nibbles).astype("<u2").view(np.uint8)
    else:
        for at in SCALES[qtype][1]:
            d = blocks[:, at : at + 2].copy().view("<f2")[:, 0]
            blocks[:, at : at + 2] = _times(d, by).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(data.shape)


def _times(d: np.ndarray, by: np.ndarray) -> np.ndarray:
    return np.clip(d.astype(np.float32) * by, -FP16_MAX, FP16_MAX).astype("<f2")
