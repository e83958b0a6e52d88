"""`quantkit calibrate`: text through the original, layer by layer, and honest statistics of every expert."""

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import torch

from quantkit import machine as probe
from quantkit import ranks
from quantkit.calibration import coverage
from quantkit.calibration.collect import collect
from quantkit.calibration.corpus import Chunks, Corpus, TextChoice, chunk
from quantkit.calibration.state import PassState
from quantkit.formats.imatrix import save_imatrix
from quantkit.progress import Advance, say, track
from quantkit.runtime.room import Place, Room
from quantkit.runtime.stream import BASE_BYTES, Source, choose_room, memory
from quantkit.tensors import Importance

HIDDEN_BYTES = 2 << 30  # hidden states beyond this are kept in bfloat16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How to measure.

    min_expert_tokens: experts with fewer are filled up with the layer's mean statistics. expert_tokens: keep drawing
    text until every expert saw that many (0: one pass over the chosen tokens). ram: limit in bytes on the device.
    hidden: where hidden states live (default: the first of device, RAM and disk that has room).
    """

    text: TextChoice = dataclasses.field(default_factory=TextChoice)
    min_expert_tokens: int = 32
    expert_tokens: int = 0
    ram: int | None = None
    hidden: Place | None = None


@torch.inference_mode()
def calibrate(source: Source, how: Calibration, out: Path, restart: bool = False) -> dict[str, Importance]:
    """Write imatrix.gguf; what is already measured survives a stop (in OUT.state, OUT.state-1, ... for each pass,
    removed when the imatrix is written)."""
    text = how.text.corpus("calibration")
    chunks = cut(text, source, how.text)
    states = [out.with_name(out.name + ".state")]
    imatrix = _pass(source, text, chunks, how, states[0], restart)
    n_chunks = len(chunks.tokens)
    while how.expert_tokens:
        rows = coverage.coverage(imatrix, how.expert_tokens)
        needed = coverage.tokens_needed(rows, n_chunks * how.text.chunk, how.expert_tokens)
        more = cut(text, source, dataclasses.replace(how.text, n_tokens=needed))
        if len(more.tokens) <= n_chunks:
            if needed > n_chunks * how.text.chunk:
                say(f"all of the text is used, and some experts still saw fewer than {how.expert_tokens} tokens")
            break
        extra = Chunks(more.tokens[n_chunks:], more.targets[n_chunks:], more.domains[n_chunks:])
        states.append(out.with_name(f"{out.name}.state-{len(states)}"))
        imatrix = coverage.merge(imatrix, _pass(source, text, extra, how, states[-1], restart))
        n_chunks = len(more.tokens)
    report_coverage(imatrix, n_chunks * how.text.chunk, how.min_expert_tokens)
    imatrix = coverage.shrink(imatrix, how.min_expert_tokens)
    if ranks.index() == 0:
        save_imatrix(out, imatrix, datasets=[text.name], chunk_count=n_chunks, chunk_size=how.text.chunk)
        for folder in states:
            shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    return imatrix


def cut(text: Corpus, source: Source, choice: TextChoice) -> Chunks:
    return chunk(text, source.tokenizer(), source.config.bos, choice.chunk, choice.n_tokens, choice.from_start)


def _pass(
    source: Source, text: Corpus, chunks: Chunks, how: Calibration, folder: Path, restart: bool
) -> dict[str, Importance]:
    """One pass over the layers, resumable: its state is in `folder`."""
    n_tokens = chunks.tokens.numel()
    hidden_dtype, room = chosen_room(source, n_tokens, how, folder.parent)
    state = PassState(folder, job_of(source, chunks))
    if restart:
        state.remove()
    say(f"calibrating on {n_tokens:,} tokens of {text.name}")
    with track("calibrate", source.config.n_layer, "layers") as advance:
        imatrix = collect(source, chunks.tokens, state, hidden_dtype=hidden_dtype, room=room, progress=Steps(advance))
    return imatrix


class Steps:
    """Turns "so many layers are done" into progress, layers of an earlier run included."""

    def __init__(self, advance: Advance):
        self.advance, self.done = advance, 0

    def __call__(self, layers: int) -> None:
        self.advance(layers - self.done)
        self.done = layers


def chosen_room(
    source: Source, n_tokens: int, how: Calibration, folder: Path, beside: int = 0
) -> tuple[torch.dtype, Room]:
    """float32 while hidden states are small; their place, in `folder` if on disk. Refuses a pass that fits nowhere.

    beside: tokens of another pass that runs along, in float32, with weights of its own in memory.
    """
    hidden_dtype = torch.float32 if n_tokens * source.config.d * 4 <= HIDDEN_BYTES else torch.bfloat16
    need = memory(source.config, source.dtype, hidden_dtype)
    limit, option = memory_limit(how.ram, source.device)
    if beside:
        limit -= memory(source.config, source.dtype, torch.float32).total(beside) - BASE_BYTES
        option += ", less what the evaluation's pass needs,"
    place = choose_room(need, n_tokens, how.hidden, limit, option, machine_memory(), source.device.type != "cpu")
    if place != "device":
        say(
            f"hidden states of {n_tokens:,} tokens ({need.per_token * n_tokens / 1e9:.1f} GB) live "
            f"{'on disk' if place == 'disk' else 'in RAM'}"
        )
    return hidden_dtype, Room(place, source.device, folder)


def job_of(source: Source, chunks: Chunks) -> str:
    """Identity of a pass: weights, tokens and arithmetic."""
    facts = f"{source.fingerprint()} {source.dtype} {source.device.type} {tuple(chunks.tokens.shape)} "
    return hashlib.sha256(facts.encode() + chunks.tokens.numpy().tobytes()).hexdigest()


def memory_limit(ram: int | None, device: torch.device) -> tuple[int, str]:
    """Bytes that a pass may use where its tensors live, and what the limit is called."""
    if ram is not None:
        return ram, "--memory"
    if device.type == "cuda":
        return probe.free_vram(device), "free GPU memory"
    return machine_memory(), "this machine's memory"


def machine_memory() -> int:
    """This rank's share of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks.local_count()


def report_coverage(imatrix: dict[str, Importance], n_tokens: int, threshold: int) -> None:
    """The coverage table, and a warning if experts fell short."""
    rows = coverage.coverage(imatrix, threshold)
    if not rows:
        return
    say(coverage.table(rows))
    if short := sum(row.below for row in rows):
        needed = coverage.tokens_needed(rows, n_tokens, threshold)
        say(
            f"warning: {short} experts saw fewer than {threshold} tokens; they lean on their layer's mean statistics. "
            f"About {needed:,} tokens would reach them all (--tokens {needed})"
        )
