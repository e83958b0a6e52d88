"""One MoE layer of a GGUF, computed by KTransformers' own kernels (kt-kernel, LLAMAFILE backend), in its own process.

Run as a module, this file is the child. A GPU is not needed: the wrapper class loads the file as sglang would, and its
C++ module is then called on ordinary memory.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quantkit.evaluation.oracles.child import IllegalInstruction, NotRun, run_module
from quantkit.models.config import ModelConfig

WHEEL = "kt-kernel==0.7.2"
VARIANTS = ("amx", "avx512_bf16", "avx512_vbmi", "avx512_vnni", "avx512_base", "avx2")  # the wheel's, best first
TIMEOUT = 300


def available() -> bool:
    """Whether kt-kernel is installed."""
    return importlib.util.find_spec("kt_kernel") is not None


def version() -> str:
    """Of the installed package."""
    return importlib.metadata.version("kt-kernel")


def experts(
    path: Path,
    layer: int,
    config: ModelConfig,
    x: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
    variant: str,
) -> torch.Tensor:
    """float32 [n, d]: weighted sum of routed experts for x [n, d], expert int64 [n, n_used], weight float32.

    Rows go through the prefill kernel together; the first few are computed again one by one, and must agree.
    IllegalInstruction if this CPU does not run the variant, another OracleError for anything else that goes wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder) / "given.pt", Path(folder) / "answer.pt"
        shape = {"n_expert": config.n_expert, "n_used": config.n_used, "d": config.d, "n_ff": config.n_ff_exp}
        torch.save({"x": x.bfloat16(), "expert": expert, "weight": weight}, given)
        request = {"path": str(path), "layer": layer, "given": str(given), "answer": str(answer)} | shape
        settings = {"KT_KERNEL_CPU_VARIANT": variant, "KT_FORCE_SYNC_SUBMIT": "1"}
        run_module(__name__, json.dumps(request), f"kt-kernel ({variant})", TIMEOUT, settings)
        found = torch.load(answer)
        if found["variant"] != variant:
            raise IllegalInstruction(f"kt-kernel loaded {found['variant']} instead of {variant}")
        return found["out"]


def runnable(
    path: Path, layer: int, config: ModelConfig, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor
) -> str:
    """The best variant that this machine runs: a CPU may name AMX among its flags and not have it."""
    for variant in [os.environ["KT_KERNEL_CPU_VARIANT"]] if "KT_KERNEL_CPU_VARIANT" in os.environ else VARIANTS:
        try:
            experts(path, layer, config, x[:16], expert[:16], weight[:16], variant)
        except IllegalInstruction:
            continue
        return variant
    raise NotRun("no variant of kt-kernel runs on this CPU")


# The child.


def _serve(request: dict[str, Any]) -> None:
    _without_pinned_memory()
    import kt_kernel

    given = torch.load(request["given"])
    n = len(given["x"])
    wrapper = kt_kernel.KTMoEWrapper(
        layer_idx=request["layer"],
        num_experts=request["n_expert"],
        num_experts_per_tok=request["n_used"],
        hidden_size=request["d"],
        moe_intermediate_size=request["n_ff"],
        gpu_experts_mask=None,
        cpuinfer_threads=2,
        threadpool_count=1,
        weight_path=request["path"],
        chunked_prefill_size=max(n, 32),
        method="LLAMAFILE",
    )
    wrapper.load_weights()
    out = _forward(wrapper, given["x"], given["expert"], given["weight"])
    for i in range(min(4, n)):
        alone = _forward(wrapper, *(given[key][i : i + 1] for key in ("x", "expert", "weight")))[0]
        if (alone - out[i]).norm() > 0.03 * out[i].norm():
            sys.exit(f"row {i} alone differs from the same row in a batch by {(alone - out[i]).norm() / out[i].norm()}")
    torch.save({"out": out, "variant": kt_kernel.__cpu_variant__}, request["answer"])
    sys.stdout.flush()
    os._exit(0)  # its worker threads may not join


def _forward(wrapper: Any, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    x, expert, weight = x.contiguous(), expert.long().contiguous(), weight.float().contiguous()
    out, n = torch.zeros_like(x), torch.tensor([len(x)], dtype=torch.int32)
    pointers = [tensor.data_ptr() for tensor in (n, expert, weight, x, out)]
    wrapper.cpu_infer.submit(wrapper.moe.forward_task(pointers[0], expert.shape[1], *pointers[1:], False))
    wrapper.cpu_infer.sync()
    return out.float()


def _without_pinned_memory() -> None:
    """Pinned memory needs CUDA; kt-kernel asks for it everywhere."""

    def unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, pin_memory=False, **options: make(*args, **options)

    for name in ("zeros", "empty", "full", "ones"):
        setattr(torch, name, unpinned(getattr(torch, name)))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
