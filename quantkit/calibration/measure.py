"""`quantkit calibrate`: text through the original, layer by layer, and honest statistics of every expert."""

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from quantkit import ranks
from quantkit.calibration import coverage
from quantkit.calibration.collect import Accumulator, Steps, collect
from quantkit.calibration.corpus import Chunks, Corpus, cut
from quantkit.calibration.options import Calibration, check_length, sized
from quantkit.calibration.state import PassState
from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import save_imatrix
from quantkit.formats.lock import locked
from quantkit.progress import say, track
from quantkit.runtime.memory import Limits, room_for
from quantkit.runtime.stream import Source, job_of
from quantkit.tensors import Importance


class Keeper(Protocol):
    """Watches a pass for more than importance, and keeps what it finds. job: what the pass's state is then of."""

    job: str

    def whole(self, layers: int) -> bool:
        """Whether all that it keeps of the first layers is there."""

    def watch(self, layer: int) -> Accumulator:
        """For the time of one layer."""


Keep = Callable[[Source, torch.Tensor], Keeper]
"""Makes the keeper of a pass over these tokens."""


@torch.inference_mode()
def calibrate(
    source: Source, how: Calibration, out: Path, restart: bool = False, keep: Keep | None = None
) -> dict[str, Importance]:
    """Write imatrix.gguf; what is already measured survives a stop (in OUT.state, OUT.state-1, ... for each pass,
    removed when the imatrix is written). keep: who watches the pass, which must be one (no expert_tokens)."""
    if keep and how.expert_tokens:
        raise QuantkitError("moments are kept of one pass: expert_tokens draws text for several")
    with locked(out.parent):
        return _calibrate(source, how, out, restart, keep)


def _calibrate(source: Source, how: Calibration, out: Path, restart: bool, keep: Keep | None) -> dict[str, Importance]:
    how = dataclasses.replace(how, text=sized(how.text, source.config, source.device, how.memory))
    text = how.text.corpus("calibration")
    chunks = cut(text, source, how.text)
    check_length(chunks, how.text, source)
    states = [out.with_name(out.name + ".state")]
    imatrix = _pass(source, text, chunks, how, states[0], restart, keep)
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
    coverage.report(imatrix, n_chunks * how.text.chunk, how.min_expert_tokens)
    imatrix = coverage.shrink(imatrix, how.min_expert_tokens)
    if ranks.index() == 0:
        save_imatrix(out, imatrix, datasets=[text.name], chunk_count=n_chunks, chunk_size=how.text.chunk)
        for folder in states:
            shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    return imatrix


def _pass(
    source: Source,
    text: Corpus,
    chunks: Chunks,
    how: Calibration,
    folder: Path,
    restart: bool,
    keep: Keep | None = None,
) -> dict[str, Importance]:
    """One pass over the layers, resumable: its state is in `folder`."""
    n_tokens = chunks.tokens.numel()
    room = room_for(source, n_tokens, Limits(how.memory, how.hidden, folder.parent))
    keeper = keep(source, chunks.tokens) if keep else None
    state = PassState(folder, keeper.job if keeper else job_of(source, chunks.tokens))
    if restart or (keeper and not keeper.whole(state.layers())):
        state.remove()
    state.check_disk(n_tokens * source.config.width * room.hidden.itemsize)
    say(f"calibrating on {n_tokens:,} tokens of {text.name}")
    with track("calibrate", Steps.total(source), "B") as advance:
        steps = Steps(advance, source, n_tokens)
        watch = steps.watching(keeper.watch if keeper else partial(Accumulator, n_expert=source.config.n_expert))
        return collect(source, chunks.tokens, state, room=room, watch=watch, progress=steps)
