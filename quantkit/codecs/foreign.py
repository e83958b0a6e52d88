"""Types that other programs write into GGUF files and nothing here decodes: their numbers and sizes, so that a header
can be read and bytes be counted.

From ggml.h, ggml.c and ggml-common.h of ik_llama.cpp at 8337e4c (August 2026), of which only types that its quantizer
writes. Q2_0 is in llama.cpp b11434; Q4_0_4_4 and its like were in llama.cpp until it came to interleave rows at load.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Foreign(NamedTuple):
    """number: in the file. block_size: weights; type_size: bytes of a block; row_meta: bytes of a row beside its
    blocks, its scale."""

    number: int
    block_size: int
    type_size: int
    row_meta: int = 0
    program: str = "ik_llama.cpp"


OLD, NEW = "an older llama.cpp", "a newer llama.cpp"
FOREIGN: Mapping[str, Foreign] = {
    **{f"Q4_0_{rows}": Foreign(n, 32, 18, program=OLD) for n, rows in ((31, "4_4"), (32, "4_8"), (33, "8_8"))},
    "Q2_0": Foreign(42, 64, 18, program=NEW),
    "Q6_0": Foreign(133, 32, 26),
    "IQ1_BN": Foreign(134, 64, 13, 2),
    "IQ2_BN": Foreign(135, 64, 16, 4),
    "IQ2_K": Foreign(137, 256, 76),
    "IQ3_K": Foreign(138, 256, 110),
    "IQ4_K": Foreign(139, 256, 144),
    "IQ5_K": Foreign(140, 256, 176),
    "IQ6_K": Foreign(141, 256, 212),
    "IQ4_KS": Foreign(144, 256, 136, 4),
    "IQ2_KS": Foreign(145, 256, 70, 2),
    "IQ4_KSS": Foreign(146, 256, 128, 4),
    "Q8_KV": Foreign(151, 32, 32, 8),
    "IQ5_KS": Foreign(152, 256, 168, 4),
    "IQ2_KT": Foreign(153, 256, 68, 4),
    "IQ3_KT": Foreign(154, 256, 100, 4),
    "IQ4_KT": Foreign(155, 256, 128, 4),
    "IQ3_KS": Foreign(156, 256, 102, 2),
    "IQ2_KL": Foreign(157, 256, 86, 2),
    "IQ1_KT": Foreign(158, 256, 56, 4),
    # Rows interleaved in fours, eights or sixteens, in the bytes of the type without suffix but for IQ1_S and IQ1_M.
    "Q4_0_R8": Foreign(202, 32, 18),
    "Q5_0_R4": Foreign(206, 32, 22),
    "Q8_0_R8": Foreign(208, 32, 34),
    "Q2_K_R4": Foreign(210, 256, 84),
    "Q3_K_R4": Foreign(211, 256, 110),
    "Q4_K_R4": Foreign(212, 256, 144),
    "Q5_K_R4": Foreign(213, 256, 176),
    "Q6_K_R4": Foreign(214, 256, 210),
    "IQ2_XXS_R4": Foreign(216, 256, 66),
    "IQ2_XS_R4": Foreign(217, 256, 74),
    "IQ3_XXS_R4": Foreign(218, 256, 98),
    "IQ1_S_R4": Foreign(219, 32, 6, 2),
    "IQ4_NL_R4": Foreign(220, 32, 18),
    "IQ3_S_R4": Foreign(221, 256, 110),
    "IQ2_S_R4": Foreign(222, 256, 82),
    "IQ4_XS_R8": Foreign(223, 256, 136),
    "IQ1_M_R4": Foreign(229, 32, 7, 2),
    "BF16_R16": Foreign(230, 1, 2),
    "Q6_0_R4": Foreign(233, 32, 26),
    "IQ2_BN_R4": Foreign(335, 64, 16, 4),
    "IQ2_K_R4": Foreign(337, 256, 76),
    "IQ3_K_R4": Foreign(338, 256, 110),
    "IQ4_K_R4": Foreign(339, 256, 144),
    "IQ5_K_R4": Foreign(340, 256, 176),
    "IQ4_KS_R4": Foreign(344, 256, 136, 4),
    "IQ5_KS_R4": Foreign(352, 256, 168, 4),
    "MXFP4_R8": Foreign(353, 32, 17),
    "Q8_K_R16": Foreign(397, 256, 258),
    "Q8_KV_R8": Foreign(398, 32, 32, 4),
    "Q8_K_R8": Foreign(399, 256, 258),
}
"""By ggml's name of each."""

BY_NUMBER: Mapping[int, str] = {foreign.number: name for name, foreign in FOREIGN.items()}
