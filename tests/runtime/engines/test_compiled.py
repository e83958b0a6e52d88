"""Kernels are compiled and loaded when an engine is opened, none while somebody waits."""

import builtins
import inspect
from collections.abc import Callable, Hashable
from importlib.util import find_spec

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.runtime import packed
from quantkit.runtime.engines import compiled, gpu, gpu_buffers, gpu_layers, heat
from quantkit.runtime.engines import step as steps
from quantkit.runtime.engines.compiled import launch_everything
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.generate import Piece
from quantkit.runtime.sources.gguf import open_gguf

if find_spec("triton"):
    import triton

    from quantkit.runtime import (
        hand_over_kernels,
        kernels,
        launches,
        mma_kernels,
        route_kernels,
        run_kernels,
        step_kernels,
        tile_kernels,
    )
else:
    pytest.skip("no Triton", allow_module_level=True)

MODULES = (hand_over_kernels, kernels, mma_kernels, route_kernels, run_kernels, step_kernels, tile_kernels)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 11
CPU, BUS, BOTH = Costs(0, 0, 1, 1, 1), Costs(1, 1, 0, 1, 1), Costs(1, 0, 100, 1, 1)
WAYS = pytest.mark.parametrize("in_memory, costs", [(0, CPU), (0, BOTH), (0.4, CPU), (0.4, BUS), (3, BUS)])


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@launches.jit_kernel(do_not_specialize=["n"])
def _store(out, n):
    triton.language.store(out, n)


def of(value: object) -> Hashable:
    """What Triton compiles a kernel for, of an argument."""
    if isinstance(value, tuple):
        return tuple(map(of, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value < 2**31
    if isinstance(value, triton.language.constexpr):
        return value.value
    return getattr(value, "__name__", None) or (None if value is None else type(value))


def of_launch(kernel: "launches.Kernel", args: tuple, options: dict) -> Hashable:
    function, any_number = kernel.jit.fn, kernel.options.get("do_not_specialize", ())
    parts = list[Hashable]()
    for (name, parameter), value in zip(inspect.signature(function).parameters.items(), args, strict=True):
        if parameter.annotation is triton.language.constexpr:
            parts.append(getattr(value, "value", value))
        else:
            parts.append("any" if name in any_number else of(value))
    return function.__module__, function.__name__, tuple(parts), tuple(sorted(options.items()))


def noted(work: Callable[[], object]) -> set[Hashable]:
    """The kinds of launches that `work` would make."""
    found = set[Hashable]()
    with (
        torch.inference_mode(),
        launches.noting(lambda kernel, _, *args, **how: found.add(of_launch(kernel, args, how))),
    ):
        work()
    return found


def test_nothing_is_launched_where_launches_are_noted():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert noted(lambda: _store[(1,)](out, 3)) == noted(lambda: _store[(2,)](out, 16)) and not out.any()
    assert noted(lambda: _store[(1,)](out.long(), 3)) != noted(lambda: _store[(1,)](out, 3))
    _store[(1,)](out, 3)
    assert out.item() == 3


def test_errors_are_raised_and_leave_nothing_behind():
    out = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def broken() -> None:
        _store[(1,)](out, 3)
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            launches.compile_at_once(broken, 2, out.device)
    _store[(1,)](out, 4)
    assert out.item() == 4
    assert launches.compile_at_once(lambda: _store[(1,)](out, 5), 2, out.device) == (DEVICE == "cuda")
    assert out.item() == 4


@pytest.mark.parametrize("kind, what", [("TritonError", "no such type"), ("RuntimeError", "Failed to find C compiler")])
def test_what_a_compiler_refuses_is_one_line(path, monkeypatch, kind, what):
    """Memory that does not suffice stays what it is, and is said as everywhere."""
    engine = GpuEngine(open_gguf(path, "cpu", n_threads=1), 1, 64, 3)
    error = getattr(triton, kind, None) or getattr(builtins, kind)

    def fails(*_) -> None:
        raise error(what)

    monkeypatch.setattr(compiled, "launch_everything", fails)
    with pytest.raises(QuantkitError, match=f"{what}; it needs a C compiler"):
        compiled.compile_kernels(engine)
    error = torch.OutOfMemoryError
    with pytest.raises(torch.OutOfMemoryError):
        compiled.compile_kernels(engine)


def prompts(engine: GpuEngine, n: int) -> None:
    """Of n tokens, and n in two of which one has one token."""
    tokens = [i % engine.config.n_vocab for i in range(n)]
    engine.prefill(0, tokens, 0, lambda rows: None)
    engine.prefill_together([Piece(1, tokens[1:], 0), Piece(2, tokens[:1], 0)])


LENGTHS = (2, 9, 17, 33, 64, 65, 100, 200, 290)


@WAYS
def test_every_kind_of_launch_is_known_before(path, monkeypatch, in_memory, costs):
    """Of prompts of all lengths and steps of all numbers of rows: on a CPU as if it had kernels, which are not
    launched, as interpreting them would take minutes."""
    for module in (packed, gpu, gpu_buffers, gpu_layers, steps):
        monkeypatch.setattr(module, "use_kernels", lambda kind: True)
    monkeypatch.setattr(packed, "_every", packed._every.__wrapped__)
    monkeypatch.setattr(heat, "LAYER_SECONDS", 0.0)
    engine = GpuEngine(open_gguf(path, "cpu", n_threads=1), SLOTS, 300, in_memory)
    engine.prompts.costs, engine.captures = costs, False
    route = engine.between.route

    def routed(*args) -> tuple:
        ids, *rest = route(*args)
        return torch.arange(ids.numel()).view_as(ids).int() % engine.config.n_expert, *rest

    monkeypatch.setattr(engine.between, "route", routed)  # or experts were whatever memory held
    known = noted(lambda: launch_everything(engine))
    assert len(known) > 50
    for n in LENGTHS:
        assert not noted(lambda n=n: prompts(engine, n)) - known, n
    for n in range(1, SLOTS + 1):
        rows = gpu_buffers.rows_of(n)
        assert not noted(lambda rows=rows: list(engine._pieces(rows, 256))) - known, n


@pytest.mark.gpu
@WAYS
def test_no_kernel_is_loaded_after_opening(path, monkeypatch, in_memory, costs):
    """As above, by what Triton itself does: prompts, and steps again and again."""
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, launches.Kernel):
                kernel.jit.device_caches.clear()
    loaded = list[str]()
    monkeypatch.setattr(triton.knobs.runtime, "kernel_load_start_hook", lambda _, __, name, *rest: loaded.append(name))
    monkeypatch.setattr(heat, "LAYER_SECONDS", 0.0)
    engine = GpuEngine(open_gguf(path, "cuda", n_threads=1), SLOTS, 300, in_memory)
    engine.prompts.costs = costs
    assert len(loaded) > 50
    loaded.clear()
    for n in LENGTHS:
        prompts(engine, n)
    for n in range(1, SLOTS + 1):
        for _ in range(3):
            engine.length[:n] = [270] * n
            engine.decode(list(range(n)), [5] * n)
    assert not loaded
