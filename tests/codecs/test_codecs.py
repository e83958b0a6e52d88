"""Every codec: sizes and values are ggml's, on random bytes, in all twins; packing and rescaling agree with them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from random_blocks import close, random_blocks

from quantkit.codecs import registry
from quantkit.codecs import types as qtypes
from quantkit.codecs.format import SUPERBLOCK, Codes, Format
from quantkit.codecs.registry import CODECS, FORMATS, codec, in_groups, numba_twin, rescale, triton_twin
from quantkit.codecs.unpack import unpack
from quantkit.ggml import quants

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform
    triton = None

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GROUPED = [name for name in CODECS if in_groups(name)]
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def test_every_type_has_a_codec():
    assert set(qtypes.QTYPES) == set(CODECS)
    assert {name for name in CODECS if name not in GROUPED} == set(FLOATS)


@pytest.mark.parametrize("name", CODECS)
def test_sizes_are_ggmls(name):
    sizes, ggml_type = qtypes.stored(name), gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[ggml_type] == (sizes.block_size, sizes.type_size)
    assert codec(name).block.itemsize == sizes.type_size
    assert sizes.row_bytes(7168) == gguf.quant_shape_to_byte_shape((1, 7168), ggml_type)[1]
    assert quants.quantize(name, np.ones((1, 256), np.float32), np.ones(256, np.float32)).nbytes == sizes.row_bytes(256)


@pytest.mark.parametrize("qtype", GROUPED)
def test_torch_decodes_as_ggml(qtype):
    data, values = random_blocks(qtype, (23,), 512)
    assert torch.allclose(codec(qtype).dequantize(data), values, rtol=1e-6, atol=0)
    assert torch.equal(codec(qtype).dequantize(data[:1]), codec(qtype).dequantize(data)[:1])
    assert not codec(qtype).dequantize(torch.zeros_like(data)).any()


if triton is not None:

    @triton.jit
    def groups(data, table, out, decode: tl.constexpr, size: tl.constexpr, per_block: tl.constexpr):
        """What `decode` makes of every group of block program_id(0): eight int8, scale and offset, [per_block, 10]."""
        j = tl.arange(0, per_block)
        lo, hi, scale, offset = decode(data + tl.program_id(0) * size, j, table)
        at = out + (tl.program_id(0) * per_block + j) * 10
        for i in tl.static_range(4):
            tl.store(at + i, ((lo << (24 - 8 * i)) >> 24).to(tl.float32))
            tl.store(at + 4 + i, ((hi << (24 - 8 * i)) >> 24).to(tl.float32))
        tl.store(at + 8, scale)
        tl.store(at + 9, offset)


@pytest.mark.skipif(triton is None, reason="no Triton on this platform")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qtype", GROUPED)
def test_triton_decodes_as_gguf(qtype, device):
    """Interpreted on the CPU, against the reference of the gguf package."""
    from quantkit.codecs.codebooks import for_kernels

    sizes, (data, _) = qtypes.stored(qtype), random_blocks(qtype, (4,), 512)
    per_block, n_blocks = sizes.block_size // 8, 4 * 512 // sizes.block_size
    out = torch.full((n_blocks, per_block, 10), torch.nan, device=device)
    table = for_kernels(codec(qtype).codebook, out.device)
    groups[(n_blocks,)](data.to(device), table, out, triton_twin(qtype), sizes.type_size, per_block)
    values = out[..., :8] * out[..., 8:9] + out[..., 9:]
    reference = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[qtype])
    assert close(values.view(4, 512), torch.from_numpy(reference), 1e-6)


# -- values without a detour -----------------------------------------------------------------------------------------


def packed(qtype: str, n_rows: int, n_in: int) -> np.ndarray:
    """Any bytes are valid blocks; the scales among them must be finite, so infinite float16 exponents are cleared."""
    rng = np.random.default_rng(0)
    if qtype in FLOATS:
        values = torch.from_numpy(rng.standard_normal((n_rows, n_in), np.float32)).to(FLOATS[qtype])
        return values.view(torch.uint8).numpy()
    data = rng.integers(0, 256, (n_rows, qtypes.stored(qtype).row_bytes(n_in)), np.uint8)
    return data & 0xBF  # bit 6 of a high byte: exponents stay below 16


def half_up(values: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, to nearest, ties away from zero: torch's own rounding but for ties."""
    return ((values.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qtype", [*CODECS, "Q4_1"])  # the last has no codec of ours
@pytest.mark.parametrize("workers", [1, 3])
def test_unpacked_values_are_ggmls(qtype, dtype, workers):
    n_rows, n_in = 200, 768
    data = packed(qtype, n_rows, n_in)
    expected = torch.from_numpy(quants.dequantize(qtype, data, n_in))
    if dtype == torch.bfloat16:
        expected = half_up(expected) if numba_twin(qtype, dtype) else expected.bfloat16()
    with ThreadPoolExecutor(workers) as pool, torch.inference_mode():  # a mode that the pool's threads do not have
        found = unpack(qtype, data, torch.full((n_rows, n_in), torch.nan, dtype=dtype), pool, workers)
    assert expected.isfinite().all() and expected.float().std() > 0
    if qtype in ("Q4_K", "Q5_K") and dtype == torch.bfloat16:  # ggml's compiler may fuse multiplication and subtraction
        near = torch.isclose(found.float(), expected.float(), rtol=2**-7)
        assert near.float().mean() > 0.9999 and (found == expected).float().mean() > 0.99
    else:
        assert torch.equal(found, expected)


def test_without_numba_ggml_decodes_and_that_is_said_once(monkeypatch, caplog):
    """Whatever is wrong with it: a numba that does not fit numpy raises another error than none."""
    monkeypatch.delitem(sys.modules, "quantkit.codecs.numba_decode", raising=False)
    monkeypatch.delattr("quantkit.codecs.numba_decode", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(registry, "_numba_decode", cache(registry._numba_decode.__wrapped__))
    for qtype in ("IQ1_S", "IQ2_XXS", "Q2_K"):
        data = packed(qtype, 200, 512)
        with ThreadPoolExecutor(2) as pool:
            found = unpack(qtype, data, torch.empty(200, 512), pool, 2)
        assert torch.equal(found, torch.from_numpy(quants.dequantize(qtype, data, 512)))
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "weights are decoded by ggml, which takes longer"
    ]


def test_unpacked_stack_of_matrices_and_part_of_a_row_count():
    data = packed("IQ2_XXS", 6, 256)
    out = torch.empty(2, 3, 256)
    with ThreadPoolExecutor(1) as pool:
        unpack("IQ2_XXS", data.reshape(2, 3, -1), out, pool, 1)
    assert torch.equal(out.view(6, 256), torch.from_numpy(quants.dequantize("IQ2_XXS", data, 256)))


# -- packing ---------------------------------------------------------------------------------------------------------


def random_codes(fmt: Format, n: int) -> Codes:
    """Every code in its whole range."""
    n_entries = len(fmt.levels) if fmt.grid is None else len(fmt.grid)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (n, *shape), dtype=torch.int32)

    sign = draw(256, 32)
    if fmt.signs == "even":  # the eighth follows from the others
        parity = sum((sign >> i) & 1 for i in range(7)) & 1
        sign = (sign & 127) | parity << 7
    per = SUPERBLOCK // fmt.block
    d, dmin = torch.rand(2, n).half()
    scale, offset = draw(len(fmt.multipliers), per), draw(max(fmt.n_mins, len(fmt.shifts)), per)
    return Codes(d, dmin, scale, offset, draw(n_entries, SUPERBLOCK // fmt.width), sign)


def meaning(fmt: Format, c: Codes) -> torch.Tensor:
    """The weights that codes stand for, as `Format` defines them: float32 [n, 256]."""
    s = c.d.float()[:, None] * torch.tensor(fmt.multipliers)[c.scale]
    if fmt.n_mins:
        o = -c.dmin.float()[:, None] * c.offset
    else:
        o = s * torch.tensor(fmt.shifts)[c.offset]
    v = torch.tensor(fmt.levels if fmt.grid is None else fmt.grid)[c.entry].view(len(s), 32, 8)
    if fmt.signs != "grid":
        v = v * (1 - 2 * ((c.sign[..., None] >> torch.arange(8)) & 1))
    v = v.view(len(s), -1, fmt.block)
    return (s[..., None] * v + o[..., None]).flatten(1)


@pytest.mark.parametrize("qtype", FORMATS)
def test_packed_codes_decode_to_what_they_mean(qtype):
    fmt = FORMATS[qtype]
    codes = random_codes(fmt, 40)
    data = fmt.pack(codes)
    assert data.shape == (40, qtypes.row_bytes(qtype, SUPERBLOCK)) and data.dtype == torch.uint8
    assert torch.allclose(codec(qtype).dequantize(data), meaning(fmt, codes), rtol=1e-6, atol=1e-6)
    assert close(torch.from_numpy(quants.dequantize(qtype, data.numpy(), SUPERBLOCK)), meaning(fmt, codes), 1e-6)


# -- new scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qtype", FORMATS)
def test_rescaled_weights_follow_the_factor(qtype):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((6, 768), dtype=np.float32) * 0.05
    data = quants.quantize(qtype, w, np.ones(768, np.float32))
    factor = rng.uniform(0.8, 1.3, (6, 3)).astype(np.float32)
    before, after = quants.dequantize(qtype, data, 768), quants.dequantize(qtype, rescale(qtype, data, factor), 768)
    expected = before.reshape(6, 3, 256) * factor[..., None]
    np.testing.assert_allclose(after.reshape(6, 3, 256), expected, rtol=2e-3, atol=2e-3 * np.abs(w).max())
    np.testing.assert_array_equal(rescale(qtype, data, np.ones((6, 3), np.float32)), data)


def test_rescaled_scales_stay_finite():
    data = quants.quantize("Q4_K", np.full((1, 256), 1e4, np.float32), None)
    after = quants.dequantize("Q4_K", rescale("Q4_K", data, np.full((1, 1), 1e9, np.float32)), 256)
    assert np.isfinite(after).all()


def test_a_factor_for_each_superblock():
    data = quants.quantize("Q4_K", np.ones((2, 256), np.float32), None)
    with pytest.raises(ValueError, match="3 factors for 2 superblocks"):
        rescale("Q4_K", data, np.ones(3, np.float32))
    with pytest.raises(KeyError):
        rescale("Q8_0", data, np.ones(2, np.float32))
