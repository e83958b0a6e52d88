"""What a plan asks of a machine: what lies where, the KV cache, expected decode speed, and the commands to start it.

Decode reads every weight that a token needs once, so tokens per second are at most

    1 / (gpu bytes / gpu bandwidth + ram bytes / ram bandwidth + disk bytes / disk bandwidth)

with the bytes of one token: all tensors but the embedding and the routed experts, the KV cache, and n_used / n_expert
of the routed experts, wherever their layer lies. Experts that the RAM cannot hold are read from the file; every expert
is taken to be used equally often. It is a bound: kernels, synchronisation and transfers come on top.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from quantkit.errors import QuantkitError
from quantkit.models.config import Mla, ModelConfig
from quantkit.planning import targets
from quantkit.planning.arithmetic import AMX, Arithmetic
from quantkit.planning.plan import Plan, PlannedTensor
from quantkit.tensors import mtp_layers

WORKSPACE = 1_500_000_000  # CUDA context and compute buffers of llama.cpp at R1's width with ubatches of 512
ASSUMED = {"ram": 60e9, "gpu": 900e9, "disk": 3e9}  # bytes/s: two channels of DDR5, a 24 GB card, an NVMe disk
CACHE_BYTES = 2  # a KV element: F16 in llama.cpp, BF16 elsewhere


@dataclass(frozen=True)
class Machine:
    """Bytes that the model may take; bandwidths in bytes a second (reading), None: not known. threads: of
    the CPU, None: as many as here. how: where a figure is from, by `ram`, `gpu`, `disk` (bandwidths) and `cpu` (its
    arithmetic): measured, published, assumed; else given."""

    ram: int
    vram: int = 0
    ram_bandwidth: float | None = None
    gpu_bandwidth: float | None = None
    disk_bandwidth: float | None = None
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    threads: int | None = None
    how: Mapping[str, str] = field(default_factory=dict)

    def completed(self) -> "Machine":
        """With ASSUMED bandwidths where none is known, and so noted."""
        given = {"ram": self.ram_bandwidth, "gpu": self.gpu_bandwidth, "disk": self.disk_bandwidth}
        noted = {part: "assumed" for part, bandwidth in given.items() if not bandwidth}
        if not self.arithmetic.cpu:
            noted["cpu"] = "assumed"
        return self.reading(ASSUMED | {part: rate for part, rate in given.items() if rate}, {**self.how, **noted})

    def reading(self, bandwidths: Mapping[str, float], how: Mapping[str, str]) -> "Machine":
        """With other bandwidths, by part; those that are not named stay."""
        return replace(
            self,
            ram_bandwidth=bandwidths.get("ram", self.ram_bandwidth),
            gpu_bandwidth=bandwidths.get("gpu", self.gpu_bandwidth),
            disk_bandwidth=bandwidths.get("disk", self.disk_bandwidth),
            how=how,
        )


@dataclass(frozen=True)
class Placement:
    """gpu_layers: MoE layers whose experts lie on the GPU (the last ones, as --n-cpu-moe counts from the first).
    resident: the other tensors. All in bytes; without a GPU everything counts as RAM. disk: what RAM cannot hold."""

    gpu_layers: tuple[int, ...]
    cpu_layers: tuple[int, ...]
    resident: int
    gpu_experts: int
    cpu_experts: int
    kv_cache: int
    gpu: int
    ram: int
    disk: int


@dataclass(frozen=True)
class Speed:
    """Bytes of one token by where they are read from, and the bound on tokens per second (None: bandwidth unknown)."""

    gpu: int
    ram: int
    disk: int
    tokens_per_second: float | None


def kv_bytes(config: ModelConfig, mla: Mla) -> int:
    """KV cache of one token in all layers. Split MLA keeps the latent and the rotary key once for all heads; the
    combined layout keeps every head's key and value. An indexer keeps keys of its own. DeepSeek-V4 keeps an entry for
    every 4 or 128 tokens, besides a window that does not grow."""
    if config.compression is not None and config.indexer is not None:
        entries = {4: (config.kv_lora + config.indexer.width) / 4, 128: config.kv_lora / 128, 0: 0.0}
        return int(CACHE_BYTES * sum(entries[ratio] for ratio in config.compression.ratios))
    per_layer = config.kv_lora + config.qk_rope if mla == "split" else config.n_head * (config.qk_head + config.v_head)
    index = config.indexer.width * sum(config.indexer.full) if config.indexer else 0
    return CACHE_BYTES * (per_layer * config.n_layer + index)


def gpu_room(config: ModelConfig, mla: Mla, vram: int, context: int) -> int:
    """What is left of the VRAM for weights."""
    room = vram - WORKSPACE - context * kv_bytes(config, mla)
    if vram and room <= 0:
        kv = context * kv_bytes(config, mla)
        raise QuantkitError(
            f"--vram {vram:,}: {kv:,} bytes of KV cache at a context of {context:,} and {WORKSPACE:,} "
            "of buffers leave no room for weights; lower --context"
        )
    return room


def loaded(plan: Plan) -> list[PlannedTensor]:
    """What llama.cpp loads: not an MTP layer, unless it is told to draft with it (`--spec-type draft-mtp`)."""
    drafting = mtp_layers(plan.tensors)
    return [tensor for tensor in plan.tensors if tensor.layer not in drafting]


def place(plan: Plan, config: ModelConfig, machine: Machine, context: int) -> Placement:
    """Everything that every token needs goes to the GPU, then the experts of whole layers from the last one up."""
    tensors = loaded(plan)
    experts = _experts_by_layer(tensors)
    resident = sum(tensor.n_bytes for tensor in tensors if not tensor.is_routed)
    cache = context * kv_bytes(config, plan.mla)
    on_gpu: list[int] = []
    if machine.vram:
        left = gpu_room(config, plan.mla, machine.vram, context) - resident
        if left < 0:
            raise QuantkitError(
                f"{plan.recipe}: attention, shared experts and the rest take {resident:,} bytes, "
                f"{-left:,} more than the GPU has beside its KV cache and buffers"
            )
        for layer in sorted(experts, reverse=True):
            if experts[layer] > left:
                break
            on_gpu.append(layer)
            left -= experts[layer]
    cpu = tuple(layer for layer in sorted(experts) if layer not in on_gpu)
    gpu_experts, cpu_experts = sum(experts[n] for n in on_gpu), sum(experts[n] for n in cpu)
    everything = (0 if machine.vram else resident + cache + WORKSPACE) + cpu_experts
    ram = min(machine.ram, everything)
    gpu = resident + cache + gpu_experts + WORKSPACE if machine.vram else 0
    return Placement(tuple(sorted(on_gpu)), cpu, resident, gpu_experts, cpu_experts, cache, gpu, ram, everything - ram)


def speed(plan: Plan, config: ModelConfig, machine: Machine, placed: Placement) -> Speed:
    """Bytes a token reads, and the bound that follows from the bandwidths."""
    share = config.n_used / config.n_expert
    lookup = sum(t.n_bytes for t in plan.tensors if t.role == "token_embd") if not config.tied else 0
    always = placed.resident - lookup + placed.kv_cache
    gpu_experts, cpu_experts = (int(share * n) for n in (placed.gpu_experts, placed.cpu_experts))
    homeless = min(always, max(0, placed.disk - placed.cpu_experts))  # not even what every token needs is in RAM
    disk = int(share * min(placed.disk, placed.cpu_experts)) + homeless
    gpu = always + gpu_experts if machine.vram else 0
    ram = cpu_experts + (0 if machine.vram else always) - disk
    parts = (gpu, machine.gpu_bandwidth), (ram, machine.ram_bandwidth), (disk, machine.disk_bandwidth)
    if any(n and not bandwidth for n, bandwidth in parts):
        return Speed(gpu, ram, disk, None)
    seconds = sum(n / bandwidth for n, bandwidth in parts if n and bandwidth)
    return Speed(gpu, ram, disk, 1 / seconds)


def whole_layers(plan: Plan, config: ModelConfig, vram: int, context: int) -> int:
    """Layers that fit on the GPU entirely, attention and experts, as llama.cpp's -ngl takes them: from the last one up
    with their share of the KV cache; the output matrix comes first."""
    sizes = [0] * config.n_layer
    for tensor in loaded(plan):
        if tensor.layer is not None:
            sizes[tensor.layer] += tensor.n_bytes
    left = vram - WORKSPACE - sum(t.n_bytes for t in plan.tensors if t.role in ("output", "output_norm"))
    cache = context * kv_bytes(config, plan.mla) // config.n_layer
    count = 0
    for size in reversed(sizes):
        left -= size + cache
        if left < 0:
            break
        count += 1
    return count


def unsloths_layers(vram: int, n_bytes: int, n_layer: int) -> int:
    """Unsloth's rule for -ngl: floor(VRAM / file size × layers - 4)."""
    return max(0, min(n_layer, int(vram / n_bytes * n_layer - 4)))


def commands(
    plan: Plan, placed: Placement, machine: Machine, context: int, file: str, original: str, threads: int
) -> dict[str, list[str]]:
    """Program -> command lines. file: the GGUF (its first split). original: the checkpoint folder."""
    first_on_gpu = placed.gpu_layers[0] if placed.gpu_layers else (max(placed.cpu_layers, default=-1) + 1)
    base = f"llama-server -m {file} -c {context} -t {threads}"
    if not machine.vram:
        amx = machine.arithmetic.matrix >= AMX and targets.aborts_on_amx((t.name, t.qtype) for t in plan.tensors)
        llama = [f"{base} -ngl 0{targets.NO_REPACK if amx else ''}"]
    elif not placed.cpu_layers:
        llama = [f"{base} -ngl 99"]
    else:
        blocks = f"blk\\.({up_to(placed.cpu_layers[-1])})\\..*" if placed.gpu_layers else ""
        llama = [f"{base} -ngl 99 --n-cpu-moe {first_on_gpu}", f"{base} -ngl 99 -ot '{blocks}exps=CPU'"]
    out = {"llama.cpp": llama}
    if plan.target == "ktransformers":
        folder = file.rpartition("/")[0] or "."
        out["KTransformers (kt-kernel with sglang)"] = [
            f"python -m sglang.launch_server --model {original} --kt-method LLAMAFILE --kt-weight-path {folder} "
            f"--kt-cpuinfer {threads} --kt-threadpool-count 1 --kt-num-gpu-experts 0 --max-total-tokens {context} "
            "--trust-remote-code"
        ]
        made = "kt" if folder == "." else f"{folder}-kt"
        out["KTransformers 0.2.3 to 0.3.2"] = [
            f"quantkit export-kt {file} --output {made}",
            f"{made}/launch.sh chat --cpu_infer {targets.cpu_infer(threads)}",
        ]
    if plan.target == "ollama":
        out["ollama"] = [
            f"printf 'FROM %s\\nPARAMETER num_ctx {context}\\n' {file} > Modelfile",
            f"ollama create {plan.model}-{plan.recipe} -f Modelfile",
            f"ollama run {plan.model}-{plan.recipe}",
        ]
    out["quantkit"] = [f"quantkit run {file} -c {context}{_limits(placed, machine)} --chat -p 'Hello'"]
    return out


def for_model(commands: Mapping[str, list[str]], config: ModelConfig) -> dict[str, list[str]]:
    """Those commands with what llama.cpp must be told of the model, which ollama is told by its environment; without
    quantkit's of a DeepSeek-V4, which it computes slower than llama.cpp."""
    flags, out = targets.start_flags("llama.cpp", config), dict(commands)
    out["llama.cpp"] = [line + flags for line in out["llama.cpp"]]
    if flags and "ollama" in out:
        out["ollama"] = [f"{targets.environment(flags)} ollama serve", *out["ollama"]]
    if config.compression is not None:
        del out["quantkit"]
    return out


def _limits(placed: Placement, machine: Machine) -> str:
    """Options of `quantkit run`. --ram counts the file alone: without a GPU the cache and buffers are beside it."""
    if not placed.disk:
        return "" if machine.vram else " --device cpu"
    for_file = machine.ram - (0 if machine.vram else placed.kv_cache + WORKSPACE)
    return f" --ram {for_file // 10**6}MB" + ("" if machine.vram else " --device cpu")


def up_to(n: int) -> str:
    """A regular expression for the numbers from 0 to n, which is below 100."""
    tens, ones = divmod(n, 10)
    if not tens:
        return f"[0-{ones}]"
    below = f"|[1-{tens - 1}][0-9]" if tens > 1 else ""
    return f"[0-9]{below}|{tens}[0-{ones}]"


def _experts_by_layer(tensors: Sequence[PlannedTensor]) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_routed and tensor.layer is not None:
            sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.n_bytes
    return sizes
