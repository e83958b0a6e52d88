"""The compiled products against ggml's, and how they are compiled, kept and shared out."""

import ctypes
import mmap
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from random_blocks import random_blocks

from quantkit.errors import QuantkitError
from quantkit.ggml.library import processor_flags
from quantkit.ggml.quants import dequantize
from quantkit.runtime.experts import cpu as cpu_module
from quantkit.runtime.experts import native as native_module
from quantkit.runtime.experts.cpu import GgmlExperts, cpu_experts
from quantkit.runtime.experts.native import NativeExperts, Rows
from quantkit.runtime.native import compiler, library
from quantkit.runtime.native.compiler import Compiled, compiled
from quantkit.runtime.native.library import CODEBOOKS, TYPES, Native, ggml_product, native
from quantkit.runtime.pauses import pausing

WIDTH = 1024
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
OTHERS = {  # what other processors would have, and what this one needs to run it
    "gathered": (["-march=native", compiler.GATHER], AVX512),
    "no VBMI": (["-march=cascadelake"], AVX512 | {"avx512_vnni"}),
    "no VNNI, permuted": (["-march=skylake-avx512", compiler.REGISTERS], AVX512),
    "AVX2": (["-march=haswell"], {"avx2", "fma", "f16c"}),
    "AVX2 with VNNI": (["-march=haswell", "-mavxvnni"], {"avx2", "fma", "f16c", "avx_vnni"}),
}

needs_native = pytest.mark.skipif(native() is None, reason="no C compiler here")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Native]:
    """The library as this machine has it, and as others would."""
    found = {"native": native()}
    for name, (flags, needed) in OTHERS.items():
        if not needed <= processor_flags():
            continue
        path = tmp_path_factory.mktemp("other") / "experts.so"
        flags = [*(flag for flag in compiler.FLAGS if flag != compiler.NATIVE), *flags]
        command = [compiler._compiler()[0], *flags, "-o", path, compiler.SOURCES / compiler.MAIN, *compiler.LIBRARIES]
        subprocess.run(command, check=True)
        found[name] = Native(Compiled(path, "a test"))
    return found


@needs_native
def test_a_machine_has_all_types_codebooks_or_none(built):
    for name, lib in built.items():
        assert lib.types == set(TYPES if "AVX-512" in str(lib) else CODEBOOKS if "AVX2" in str(lib) else ())
        assert name == "native" or ("AVX2" in name) == ("AVX2" in str(lib))


@needs_native
@pytest.mark.parametrize("qtype", TYPES)
def test_products_are_ggmls(qtype, built):
    """Every field in its whole range, zero blocks, and activations that are zero, tiny or have one large value."""
    rows = random_blocks(qtype, (48,), WIDTH)[0].numpy()
    rows[3] = 0
    x = np.random.default_rng(1).standard_normal((16, WIDTH), np.float32)
    x[1] = 0
    x[2, 256:512] = 0
    x[3] *= 1e-30
    x[4, 300] = -1e4
    x[5] = np.float32(-1.5)
    expected = ggml_product(qtype, rows, x)
    values = np.abs(dequantize(qtype, rows, WIDTH))
    magnitudes = values @ np.abs(x).T
    # Where one input is large and its weight happens to be small, offsets cancel: in ggml's sums as well.
    largest = np.repeat(values.reshape(len(rows), -1, library.SUPERBLOCK).max(2), library.SUPERBLOCK, 1)
    magnitudes[:, 4] = largest @ np.abs(x[4])
    for name, lib in built.items():
        if qtype not in lib.types:
            continue
        found = lib.product(qtype, rows, x)
        assert np.isfinite(found).all()
        assert (np.abs(found - expected) <= 1e-6 * magnitudes).all(), name
        for i in (0, 4, 15):  # a column has the same bits whatever is beside it
            np.testing.assert_array_equal(lib.product(qtype, rows, x[i : i + 1])[:, 0], found[:, i])
        for m in (2, 3, 4):  # which have loops of their own
            np.testing.assert_array_equal(lib.product(qtype, rows, x[:m]), found[:, :m])


@pytest.fixture(scope="module")
def before_a_wall() -> Callable[[np.ndarray], np.ndarray]:
    """Copies bytes to where memory ends: whoever reads on behind them dies."""
    size, page = 1 << 20, mmap.PAGESIZE
    memory = mmap.mmap(-1, size + page)
    place = np.frombuffer(memory, np.uint8)
    assert not ctypes.CDLL(None).mprotect(ctypes.c_void_p(place.ctypes.data + size), ctypes.c_size_t(page), 0)

    def put(data: np.ndarray) -> np.ndarray:
        place[size - data.size : size] = data.reshape(-1)
        return place[size - data.size : size].reshape(data.shape)

    return put


@needs_native
@pytest.mark.parametrize("qtype", TYPES)
def test_rows_end_where_memory_does(qtype, built, before_a_wall):
    """At any address, of one superblock and of more than indices are written ahead for."""
    for n_in in (256, 256 * 65):
        rows = before_a_wall(random_blocks(qtype, (5,), n_in)[0].numpy())
        x = np.random.default_rng(1).standard_normal((5, n_in), np.float32)
        expected = ggml_product(qtype, rows.copy(), x)
        magnitudes = np.abs(dequantize(qtype, rows.copy(), n_in)) @ np.abs(x).T
        for name, lib in built.items():
            if qtype in lib.types:
                for m in range(1, 6):
                    found = lib.product(qtype, rows, x[:m])
                    assert (np.abs(found - expected[:, :m]) <= 1e-6 * magnitudes[:, :m]).all(), (name, n_in, m)


def layer(qtypes: tuple[str, str, str], d: int = 512, n_ff: int = 256, n_expert: int = 8, n_used: int = 3):
    """Stacks and config of one layer, weights of ordinary size."""
    generator = np.random.default_rng(5)
    stacks = []
    for qtype, n_out, n_in in zip(qtypes, (n_ff, n_ff, d), (d, d, n_ff), strict=True):
        width = library.row_size(qtype, 256)
        blocks = generator.integers(0, 256, (n_expert * n_out * n_in // 256, width), np.uint8)
        if qtype in library.HALVES:
            for byte in library.HALVES[qtype]:
                blocks[:, byte] = blocks[:, byte] & 3 | 0x20
        else:  # of 32 weights, d first
            blocks.reshape(-1, width // 8)[:, 1] = 0x20
        stacks.append((qtype, blocks.reshape(n_expert, n_out, -1)))
    return stacks, SimpleNamespace(d=d, n_ff_exp=n_ff, n_expert=n_expert, n_used=n_used, limit=None)


def inputs(c, n: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(c.n_expert, generator=generator)[: c.n_used] for _ in range(n)])
    return torch.randn(n, c.d, generator=generator), ids.int(), torch.rand(n, c.n_used, generator=generator)


@needs_native
@pytest.mark.parametrize(
    "qtypes", [("IQ1_S", "IQ1_S", "IQ2_XXS"), ("Q2_K", "IQ1_M", "Q3_K"), ("IQ4_XS", "Q4_K", "IQ4_NL"), ("Q8_0",) * 3]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_experts_are_ggmls(qtypes, threads):
    """Also of types that ggml's own functions multiply, with activations of another form."""
    stacks, c = layer(qtypes)
    ours = cpu_experts(stacks, c, threads)
    assert isinstance(ours, NativeExperts)
    theirs = GgmlExperts(stacks, c, threads)
    for n in (1, 2, 40):
        given = inputs(c, n)
        found, expected = ours(*given), theirs(*given)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        for i in range(min(n, 5)):
            assert torch.equal(ours(*(value[i : i + 1] for value in given))[0], found[i])


def handed_over(c, given: tuple[torch.Tensor, ...], n: int) -> Rows:
    """Rows that a GPU would write, of which none has come; those beyond n repeat the last."""
    x, ids, weight = given
    flags, kept = torch.zeros(2, 16, dtype=torch.int32), torch.zeros(n, c.n_used, dtype=torch.int32)
    return Rows(n, len(x), x, ids, weight, torch.zeros(x.shape), kept, *flags)


@needs_native
def test_rows_of_a_step_are_answered_in_one_call(monkeypatch):
    """Once all of them have come, those that are too many with the last one's answer; then the GPU is told."""
    monkeypatch.setattr(native_module, "PATIENCE_NS", 60_000_000_000)  # others may have the cores
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    experts, given = cpu_experts(stacks, c, 2), inputs(c, 4)
    expected = experts(*given)
    rows = handed_over(c, given, 3)
    exchange = experts.exchange(rows)
    with ThreadPoolExecutor(1) as other:
        answer = other.submit(exchange, 7)
        for i in range(4):
            assert not answer.done() and not rows.answered[0]
            time.sleep(0.005)
            rows.arrived[i] = 7
        assert answer.result()
    assert torch.equal(rows.out, expected[[0, 1, 2, 2]]) and torch.equal(rows.kept, given[1][:3])
    assert rows.answered[0] == 7 and not rows.answered[1:].any()


@needs_native
def test_rows_that_do_not_come(monkeypatch):
    """Nobody waits for ever, and what is not there is not answered; nor are experts that there are not."""
    monkeypatch.setattr(native_module, "PATIENCE_NS", 1_000_000)
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    rows = handed_over(c, inputs(c, 2), 2)
    exchange = cpu_experts(stacks, c, 2).exchange(rows)
    rows.arrived[0] = 7
    assert not exchange(7) and not rows.out.any() and not rows.answered.any()
    rows.arrived[1] = 7
    rows.ids[1, 0] = c.n_expert
    with pytest.raises(QuantkitError, match="lower --context"):
        exchange(7)
    assert not rows.answered.any()


@needs_native
def test_rows_live_as_long_as_their_answer():
    """Compiled code has nothing but their addresses."""
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    rows = handed_over(c, inputs(c, 2), 2)
    exchange, out = cpu_experts(stacks, c, 2).exchange(rows), weakref.ref(rows.out)
    del rows
    assert out() is not None
    del exchange
    assert out() is None


@needs_native
def test_who_cannot_answer_in_one_call():
    """Where experts must be read first, more rows than are computed at once, and ggml."""
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    rows = handed_over(c, inputs(c, 3), 3)
    assert cpu_experts(stacks, c, 1, need=lambda experts: None).exchange(rows) is None
    assert cpu_experts(stacks, c, 1, rows=2).exchange(rows) is None
    assert GgmlExperts(stacks, c, 1).exchange(rows) is None


@needs_native
def test_both_cut_gate_and_up_off():
    """As DeepSeek-V4 does, where nearly all are beyond the limit."""
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    given, whole = inputs(c, 5), GgmlExperts(stacks, c, 2)(*inputs(c, 5)).clone()
    c.limit = 0.01
    found, expected = cpu_experts(stacks, c, 2)(*given), GgmlExperts(stacks, c, 2)(*given)
    assert expected.abs().max() < 0.1 * whole.abs().max()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@needs_native
def test_experts_below_0_are_left_out():
    """By both, whole tokens and all of them too."""
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    x, ids, weight = inputs(c, 6)
    left = ids.clone()
    left[0, 1] = left[2, 0] = left[2, 2] = -3
    left[4] = -1
    for experts in (cpu_experts(stacks, c, 2), GgmlExperts(stacks, c, 2)):
        expected = experts(x, ids, weight * (left >= 0)).clone()
        torch.testing.assert_close(experts(x, left, weight), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(experts(x[2:3], left[2:3], weight[2:3])[0], expected[2])
        assert not experts(x, torch.full_like(left, -1), weight).any()


@needs_native
def test_others_are_let_in_between_some_experts(monkeypatch):
    """The same bits, though others compute with the same experts meanwhile; ggml lets them in between some tokens."""
    monkeypatch.setattr(native_module, "SHORT_EXPERTS", 3)
    monkeypatch.setattr(cpu_module, "SHORT_ROWS", 15)
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    given, other = inputs(c, 40), inputs(c, 2, 1)
    given[1][3] = given[1][5, 0] = -1
    for experts, n in ((cpu_experts(stacks, c, 2), -(-c.n_expert // 3)), (GgmlExperts(stacks, c, 2), 3)):
        expected, beside = experts(*given).clone(), experts(*other).clone()
        asked: list[str] = []

        def others(what: str, experts=experts, beside=beside, asked=asked) -> None:
            assert torch.equal(experts(*other), beside)
            asked.append(what)

        with pausing(others):
            assert torch.equal(experts(*given), expected)
            assert asked == ["experts on the CPU"] * n
            assert not experts(given[0][:1], torch.full_like(given[1][:1], -1), given[2][:1]).any()


@needs_native
def test_our_threads_call_ggmls_products_where_we_have_none(monkeypatch):
    """As on a processor without AVX-512."""
    monkeypatch.setattr(native(), "types", set())
    stacks, c = layer(("IQ1_S", "Q2_K", "IQ2_XXS"))
    given = inputs(c, 5)
    found, expected = cpu_experts(stacks, c, 2)(*given), GgmlExperts(stacks, c, 2)(*given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@needs_native
def test_two_threads_may_ask_at_once():
    stacks, c = layer(("IQ1_S", "IQ1_S", "IQ2_XXS"))
    experts = [cpu_experts(stacks, c, 2) for _ in range(2)]
    given = [inputs(c, 4, seed) for seed in range(2)]
    expected = [experts[i](*given[i]) for i in range(2)]
    wrong = []

    def ask(i: int) -> None:
        for _ in range(200):
            experts[i].wake()
            if not torch.equal(experts[i](*given[i]), expected[i]):
                wrong.append(i)

    asking = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert not wrong


@needs_native
def test_more_threads_than_cores_compute_the_same():
    """Those that sleep come when all is taken, and outputs wait for an expert that a stopped thread computes."""
    stacks, c = layer(("IQ1_S", "Q8_0", "IQ2_XXS"))
    alone, many = (cpu_experts(stacks, c, n) for n in (1, 7))
    for i in range(60):
        given = inputs(c, 1 + i % 3, i)
        assert torch.equal(many(*given), alone(*given))
        if i % 5 == 0:
            time.sleep(0.002)


@needs_native
def test_it_is_loaded_once_however_many_ask_first(monkeypatch):
    """Loading writes tables that another thread's products may be reading."""
    monkeypatch.setattr(library, "_native", cache(library._native.__wrapped__))
    with ThreadPoolExecutor(4) as pool:
        assert len({id(lib) for lib in pool.map(lambda _: native(), range(4))}) == 1


@needs_native
def test_an_expert_that_is_none_is_an_error():
    stacks, c = layer(("Q2_K",) * 3)
    x, ids, weight = inputs(c, 1)
    ids[0, 0] = c.n_expert
    with pytest.raises(QuantkitError):
        cpu_experts(stacks, c, 1)(x, ids, weight)


FORKS = """
import os, sys
sys.path[:0] = {path!r}
from test_native import inputs, layer
from quantkit.runtime.experts.cpu import cpu_experts
stacks, c = layer(("Q2_K",) * 3)
experts, given = cpu_experts(stacks, c, 3), inputs(c, 2)
before = experts(*given)
child = os.fork()
same = bool((cpu_experts(stacks, c, 3)(*given) == before).all()) and bool((experts(*given) == before).all())
if child == 0:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
"""


@needs_native
def test_a_fork_has_threads_of_its_own_and_exit_does_not_hang():
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    subprocess.run([sys.executable, "-c", FORKS.format(path=path)], check=True, timeout=60)


def test_rows_that_are_not_whole_superblocks_are_ggmls():
    stacks, c = layer(("Q8_0",) * 3)
    c.n_ff_exp = 128
    halves = [(q, np.ascontiguousarray(v[:, :128])) for q, v in stacks[:2]]
    halves.append(("Q8_0", np.ascontiguousarray(stacks[2][1][:, :, : 4 * 34])))
    assert isinstance(cpu_experts(halves, c, 1), GgmlExperts)


@needs_native
def test_a_damaged_library_is_compiled_again(tmp_path, monkeypatch, capsys):
    kept = compiled().path
    path = tmp_path / "quantkit" / "native" / kept.name
    path.parent.mkdir(parents=True)
    for one in kept.parent.glob(f"{kept.stem}*"):
        shutil.copy2(one, path.parent)
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path)
    good, when = path.read_bytes(), path.stat().st_mtime_ns
    assert compiled().path == path and path.stat().st_mtime_ns == when
    path.write_bytes(good[:-100] + bytes(100))
    assert compiled().path == path
    assert compiler._whole(path) and path.stat().st_size == len(good)
    assert "damaged" in capsys.readouterr().err
    assert sorted(found.suffix for found in path.parent.iterdir()) == [".sha256", ".so"]


AMD = "vendor_id\t: AuthenticAMD\nmodel\t\t: 2\ncpu MHz\t\t: 2596.1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n"
INTEL, ARM = AMD.replace("AuthenticAMD", "GenuineIntel"), "CPU part\t: 0xd4f\nFeatures\t: fp asimd\n"


@pytest.mark.parametrize(
    "cpuinfo, slowed, added",
    [
        (AMD, "Not affected\n", [compiler.REGISTERS]),
        (AMD, None, [compiler.REGISTERS]),  # an older Linux
        (INTEL, "Not affected\n", [compiler.GATHER]),
        (INTEL, "Mitigation: Microcode\n", []),
        (INTEL, None, []),
        (INTEL.replace("avx2", "avx2 amx_tile"), None, [compiler.GATHER]),  # in a sandbox
        (AMD.replace("avx2", "avx2 avx512_fp16"), None, [compiler.REGISTERS]),
        (ARM, None, []),
    ],
)
def test_lookups_are_by_the_processor(cpuinfo, slowed, added, tmp_path, monkeypatch):
    for name, text in (("CPUINFO", cpuinfo), ("SLOWED", slowed)):
        monkeypatch.setattr(compiler, name, tmp_path / name)
        if text is not None:
            (tmp_path / name).write_text(text)
    assert compiler.flags() == (*compiler.FLAGS, *added)


@pytest.mark.parametrize(
    "cpuinfo, other, same",
    [
        (AMD, AMD.replace("2596.1", "3000.0"), True),
        (AMD, AMD.replace("fpu avx2", "fpu"), False),
        (AMD, AMD.replace(": 2\n", ": 17\n"), False),  # a feature may have no name in an older Linux
        (ARM, ARM.replace("asimd", "asimd sve"), False),
    ],
)
def test_what_is_kept_is_of_this_processor(cpuinfo, other, same, tmp_path, monkeypatch):
    """Also where several machines have one home."""
    monkeypatch.setattr(compiler, "CPUINFO", tmp_path / "cpuinfo")
    found = []
    for text in (cpuinfo, other):
        compiler.CPUINFO.write_text(text)
        found.append(compiler._depends_on("cc", "1.0"))
    assert (found[0] == found[1]) == same


BROKEN = "#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit\necho 'x.c:1: error: no' >&2\nexit 1\n"


@pytest.mark.parametrize("script, said", [("", "no C compiler"), (BROKEN, "x.c:1: error: no")])
def test_without_a_compiler_ggml_computes_and_it_is_said(script, said, tmp_path, monkeypatch, capsys):
    if script:
        (tmp_path / "cc").write_text(script)
        (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiler, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("quantkit.runtime.experts.native.native", library._native.__wrapped__)
    stacks, c = layer(("Q2_K",) * 3)
    experts = cpu_experts(stacks, c, 1)
    assert isinstance(experts, GgmlExperts) and experts(*inputs(c, 1)).isfinite().all()
    line = capsys.readouterr().err
    assert "by ggml" in line and said in line


def test_it_can_be_switched_off(monkeypatch, capsys):
    monkeypatch.setenv(library.SWITCH, "off")
    assert library._native.__wrapped__() is None
    assert "QUANTKIT_NATIVE is off" in capsys.readouterr().err
