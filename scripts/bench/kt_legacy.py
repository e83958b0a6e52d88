"""KTransformers 0.2.3 to 0.3.2 (archived by now) on what `quantkit export-kt` wrote, beside quantkit's numbers.

    python scripts/bench/kt_legacy.py types FOLDER                  # dequantizers of its loader, kernels of its experts
    python scripts/bench/kt_legacy.py model FOLDER-kt REF.pt        # its own program, on cuda:0
    python scripts/bench/kt_legacy.py model FOLDER-kt REF.pt --cpu  # without CUDA: its modules, with stand-ins

Needs an installed ktransformers and nothing of quantkit, so that the two may live in different environments; REF.pt
and FOLDER are made by `kt_reference.py`. On a GPU the rules are used as they were written, and the prompt goes through
KTransformers' own `prefill_and_generate`, in pieces of one token: longer ones need flash-attn.

--cpu puts every module on the CPU. What it stands in for, and is therefore not tested by it: the CUDA operators
(KTransformersOps, vLLMMarlin: imports only), pinned memory, Marlin's product (KLinearTorch, with --marlin on weights
that KTransformers' own code has rounded to 4 bits), flash-attn, a compute capability and a stream where 0.2.3 asks
for them, and the loop of `prefill_and_generate`, which refuses to run.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import types as modules
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch

PATIENCE = 90  # seconds for one type; ten will do
AT_ONCE = 4  # types


def stand_ins() -> None:
    """What a machine without CUDA lacks."""
    for name in ("KTransformersOps", "vLLMMarlin"):
        sys.modules[name] = modules.ModuleType(name)
    import ktransformers

    if ktransformers.__version__ == "0.2.3":  # later ones ask whether they are there
        stub: Any = modules.ModuleType("flash_attn")
        stub.flash_attn_func = stub.flash_attn_with_kvcache = None
        stub.__spec__ = ModuleSpec("flash_attn", None)
        sys.modules["flash_attn"] = stub
    zeros = torch.zeros

    def unpinned(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*size, **options)

    torch.zeros = unpinned  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda device=None: (0, 0)  # type: ignore[assignment]  # asked at import
    if ktransformers.__version__ == "0.2.3":
        import ktransformers.util.utils

        ktransformers.util.utils.get_compute_capability = lambda device=None: 0  # None, and compared with 8
        torch.cuda.is_current_stream_capturing = lambda: False


def threads() -> None:
    """Of its experts, before they are imported: its default, three less than there are cores, may be none."""
    from ktransformers.server.config.config import Config

    Config().cpu_infer = torch.get_num_threads() + 1


# Types.


def check_types(folder: Path) -> None:
    """A process for each: a kernel may end it."""
    types = torch.load(folder / "types.pt")["types"]

    def ask(layer: int) -> str:
        command = [sys.executable, __file__, "type", str(folder), "--layer", str(layer)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
            printed, ended = done.stdout, "" if done.returncode == 0 else f"process ended ({done.returncode})"
        except subprocess.TimeoutExpired as hung:
            printed, ended = (hung.stdout or b"").decode(), f"still at it after {PATIENCE} s"
        lines = [line for line in printed.splitlines() if line.startswith("RESULT ")]
        said = json.loads(lines[-1][7:]) if lines else {}
        return " | ".join([types[layer], *(str(said.get(key, ended)) for key in ("dequantizer", "gpu", "one", "many"))])

    print("| type | dequantizer: largest difference | on the GPU | experts, one row | 32 rows |\n|---|---|---|---|---|")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for row in pool.map(ask, range(len(types))):
            print(f"| {row} |", flush=True)


def check_type(folder: Path, layer: int) -> None:
    """Dequantizer and experts of one layer; what is known is printed before the next step can end the process."""
    if not torch.cuda.is_available():
        stand_ins()
    threads()
    from ktransformers.operators.experts import KExpertsCPU

    try:
        from ktransformers.util.custom_loader import GGUFLoader
    except ImportError:
        from ktransformers.util.custom_gguf import GGUFLoader
    reference = torch.load(folder / "types.pt")
    qtype, loader = reference["types"][layer], GGUFLoader(str(folder / "gguf"))
    result: dict[str, str] = {"gpu": "no GPU"}
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")]
    gate, up, down = (reference["decoded"][name] for name in names)
    exact = torch.bfloat16 if qtype == "BF16" else torch.float32  # it takes BF16 for what it always gives
    for key, device in [("dequantizer", "cpu")] + [("gpu", "cuda:0")] * torch.cuda.is_available():
        try:
            found = loader.load_gguf_tensor(names[0], device=device, target_dtype=exact).float().cpu()
            result[key] = f"{float((found - gate).abs().max()):.2g}"
        except Exception as error:
            result[key] = f"{type(error).__name__}: {error}"
        print("RESULT " + json.dumps(result), flush=True)
    x, expert, weight = reference["x"], reference["expert"], reference["weight"]
    config = modules.SimpleNamespace(
        num_experts_per_tok=expert.shape[1], hidden_size=x.shape[1], moe_intermediate_size=gate.shape[1]
    )
    torch.set_default_dtype(torch.bfloat16)
    operator = KExpertsCPU(f"blk.{layer}", loader, config, len(gate), device="cpu", out_device="cpu")
    operator.load(warmup=True)
    want = torch.stack(
        [
            sum(
                w * (down[e] @ (torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row)))
                for e, w in zip(chosen, weights, strict=True)
            )
            for row, chosen, weights in zip(x.float(), expert, weight, strict=True)
        ]
    )
    for key, n in (("one", 1), ("many", len(x))):
        found = operator.forward(x[:n], expert[:n], weight[:n]).float()
        error = float((found - want[:n]).norm() / want[:n].norm())
        result[key] = "zeros" if not found.any() else f"{error:.2%}"
        print("RESULT " + json.dumps(result), flush=True)


# Models.


def load(folder: Path, rules: Path, device: str) -> tuple[Any, Any, Any]:
    """Model, tokenizer and configuration, as `local_chat` opens them."""
    from ktransformers.models.modeling_deepseek_v3 import DeepseekV3ForCausalLM
    from ktransformers.optimize.optimize import optimize_and_load_gguf
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    where = str(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=True)
    config = AutoConfig.from_pretrained(where, trust_remote_code=True)
    torch.set_default_dtype(config.torch_dtype)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    optimize_and_load_gguf(model, str(rules), str(folder / "gguf"), config, default_device=device)
    model.generation_config = GenerationConfig.from_pretrained(where)
    model.generation_config.top_k = 1  # greedy: the only setting that `prefill_and_generate` leaves
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    return model.eval(), tokenizer, config


def cache(model: Any, config: Any, n: int) -> Any:
    """Its own, for n tokens."""
    from ktransformers.models.custom_cache import StaticCache

    where = model.gguf_loader.tensor_device_map
    return StaticCache(config=config, max_batch_size=1, max_cache_len=n, device=where, dtype=model.dtype)


def step(model: Any, tokens: list[int], start: int, held: Any, device: str) -> torch.Tensor:
    """float32 logits [n_vocab] of the last of these tokens; what `prefill_and_generate` calls, too."""
    position = torch.arange(start, start + len(tokens), device=device, dtype=torch.int32)
    x = model.model.embed_tokens(torch.tensor([tokens])).to(device)
    held.cur_idx = position
    out = model(
        inputs_embeds=x,
        position_ids=position[None],
        cache_position=position,
        past_key_values=held,
        return_dict=False,
        use_cache=True,
    )
    return out[0][0, -1].float().cpu()


def greedy(model: Any, config: Any, prompt: list[int], n: int) -> list[int]:
    """Without CUDA: the whole prompt at once, then token by token."""
    held = cache(model, config, len(prompt) + n)
    tokens = [int(step(model, prompt, 0, held, "cpu").argmax())]
    while len(tokens) < n and tokens[-1] != config.eos_token_id:
        tokens.append(int(step(model, tokens[-1:], len(prompt) + len(tokens) - 1, held, "cpu").argmax()))
    return tokens


def round_to_marlin(model: Any) -> None:
    """Weights of every KTransformersLinear as Marlin holds them: 4 bits, groups of 64, by KTransformers' own code."""
    import ktransformers.ktransformers_ext.operators.custom_marlin.quantize.utils.quant_utils as marlin

    for module in model.modules():
        if type(module).__name__ == "KTransformersLinear":
            linear = module.generate_linear
            q, s, *_ = marlin.quantize_weights(linear.weight.contiguous(), 4, 64, False)
            linear.weight = (q - 8).to(s.dtype) * s.repeat_interleave(64, dim=0)


def check_model(folder: Path, reference: dict[str, Any], cpu: bool, marlin: bool) -> None:
    """Tokens after every prompt, and logits of the text, token by token."""
    rules, device = folder / "optimize.yaml", "cpu" if cpu else "cuda:0"
    if cpu:
        stand_ins()
        text = rules.read_text().replace("cuda:0", "cpu").replace("KLinearMarlin", "KLinearTorch")
        rules = Path(tempfile.mkdtemp()) / "cpu.yaml"
        rules.write_text(text)
    import ktransformers

    threads()
    torch.set_grad_enabled(False)
    model, tokenizer, config = load(folder, rules, device)
    if marlin:
        round_to_marlin(model)
    equal = 0
    for n, (text, prompt) in enumerate(zip(reference["texts"], reference["prompts"], strict=True)):
        want, exact = reference["tokens"][n], reference["exact"][n]
        ids = tokenizer.encode(text)
        if cpu:
            found = greedy(model, config, prompt, len(want))
        else:
            from ktransformers.util.utils import prefill_and_generate

            found = prefill_and_generate(
                model, tokenizer, torch.tensor([prompt], device=device), len(want), chunk_size=1
            )
        same = next((i for i, (a, b) in enumerate(zip(found, want, strict=False)) if a != b), len(found))
        equal += same == len(found)
        said = "all" if same == len(found) else f"the first {same}"
        if same < len(found):  # how near a tie was it, to quantkit's decoded weights?
            p = exact[same].softmax(-1)
            said += f" (then {p[found[same]]:.3f} or {p[want[same]]:.3f} probable)"
        print(f"PROMPT {text!r}: ids {'equal' if ids == prompt else ids}; {said} of {len(want)} tokens equal: {found}")
    held = cache(model, config, len(reference["scored"]) + 1)
    logits = torch.stack([step(model, [t], i, held, device) for i, t in enumerate(reference["scored"])])
    kld, top = agreement(reference["logits"], logits)
    where = f"torch {torch.__version__}, {'stand-ins on the CPU' if cpu else device}"
    rounded = ", linears rounded to 4 bits" if marlin else ""
    print(
        f"ktransformers {ktransformers.__version__}, {where}{rounded}: {equal} of {len(reference['prompts'])} "
        f"continuations equal; {len(logits)} tokens: KLD mean {kld.mean():.5f}, median {kld.median():.5f}, "
        f"worst {kld.max():.3f}, same top {top:.1%}"
    )


def agreement(p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, float]:
    """KLD of q from p in nats for every row, and the share of rows with the same top."""
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kld = (p.exp() * (p - q)).sum(-1)
    assert math.isfinite(float(kld.sum())), "logits that are not finite"
    return kld, float((p.argmax(-1) == q.argmax(-1)).double().mean())


def main() -> None:
    """Commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("types", "type", "model"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", type=Path, nargs="?")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--marlin", action="store_true")
    given = parser.parse_args()
    if given.what == "types":
        check_types(given.folder)
    elif given.what == "type":
        check_type(given.folder, given.layer)
    else:
        check_model(given.folder, torch.load(given.reference), given.cpu, given.marlin)


if __name__ == "__main__":
    main()
