"""Recovery: what a finished file leaves free is tuned against the original. Not a byte is added.

Norms and routers (F32 in the file) move, the weights of the matrices of 4 bits and more outside of the routed experts,
which are encoded once more in the end, and the scales of all others (`tuned`). The loss is the KL divergence of the
logits from the original's at all positions; the optimizer is Adam with factored mean squares, whose one momentum fits
on a disk (`values`). Forward and backward go layer by layer (`step`), so a model of any size can be recovered: the file
is read twice a step. When it stops, and which of its states is taken, is decided by text of other domains than it
trains on (`text`).
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit import ranks
from quantkit.calibration import gradients
from quantkit.calibration.corpus import Chunks, TextChoice
from quantkit.calibration.spill import Spill
from quantkit.formats import sealed
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.whole_file import make_folders
from quantkit.job.recovery.options import RecoverOptions, Sizes, as_disk_allows
from quantkit.job.recovery.passes import Target, forward, inputs, measure
from quantkit.job.recovery.step import TrainingStep
from quantkit.job.recovery.student import Student
from quantkit.job.recovery.text import Split
from quantkit.job.recovery.tuned import Tuned, moving, scaled
from quantkit.job.recovery.twin import Twin, encode_again
from quantkit.job.recovery.values import Values
from quantkit.planning.plan import Plan
from quantkit.progress import Advance, say, track
from quantkit.runtime.layers import only_forward
from quantkit.runtime.memory import room_for
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.runtime.stream import Source

STATE = ".state-recovery"  # after the file's name: the folder of what is done so far
FORMAT = 4  # of the state: another number, another job
PROGRESS = "progress"
RECOMPUTED = ("original", "encode")  # folders of the state whose files can be made again
PATIENCE = 3  # measurements without a gain after which it stops: two came before proxy-a's best


class Progress:
    """Of a small file: steps that are done, and the KLD that was measured after how many. `before`: of the base."""

    def __init__(self, spill: Spill):
        self.spill = spill
        there = ranks.agree(lambda: spill.has(PROGRESS))
        found = json.loads(spill.noted(PROGRESS)[PROGRESS]) if there else {}
        self.step: int = found.get("step", 0)
        self.before: float | None = found.get("before")
        self.measured = {int(step): kld for step, kld in found.get("measured", {}).items()}

    def save(self) -> None:
        """Durably, by rank 0."""
        found = {"step": self.step, "before": self.before, "measured": self.measured}
        self.spill.note(PROGRESS, {PROGRESS: json.dumps(found)})

    @property
    def best(self) -> int:
        """Steps after which the KLD was least."""
        return min(self.measured, key=lambda step: (self.measured[step], step))

    @property
    def over(self) -> bool:
        """Whether the last measurements have brought nothing."""
        return sum(step > self.best for step in self.measured) >= PATIENCE


class Recovery:
    """One job: base file, original and text, and its state in a folder."""

    def __init__(
        self, base: Path, original: CheckpointSource, chunks: Chunks, how: RecoverOptions, state: Path, job: str
    ):
        self.original, self.how, self.state, self.job = original, how, state, job
        weights = open_gguf(base, original.device)
        self.base, specs = weights.file, moving(weights.config, weights.file.tensors, how.moves)
        sizes = Sizes.of(weights.config, weights.file.tensors, how)
        self.split = Split.of(chunks.domains)
        self.batches = self.split.batches(how.steps, max(1, how.tokens // chunks.tokens.shape[1]))
        if len(self.batches) < how.steps:
            say(f"recovery: {len(self.batches)} steps instead of {how.steps}, because the text is short")
        self.how = how = how.on(len(self.split.train) * chunks.tokens.shape[1], len(self.batches))
        used = torch.cat([torch.cat(self.batches).unique(), torch.tensor(self.split.held)]).unique()
        self.tokens, self.used = chunks.tokens[used], used
        ranks.agree(lambda: make_folders(state))
        shape = len(self.batches[0]), chunks.tokens.shape[1]
        self.room = sizes.room(original, shape, how.limits(state), gradients.memory(original, 1, shape[1]))
        self.values = Values(state, specs, sizes.dtype, scaled(specs, weights.file.tensors))
        tuned = Tuned(weights.file, original.checkpoint, self.values, original.device)
        self.student = Student(weights, tuned, original.dtype)
        self.progress = Progress(Spill(state, job))

    def _spill(self, name: str) -> Spill:
        return Spill(self.state / name, self.job)

    def _chunks(self, numbers: torch.Tensor) -> torch.Tensor:
        """Where these chunks of the text are among those that are used."""
        return torch.searchsorted(self.used, numbers)

    def run(self, twin: Twin) -> dict[str, Any]:
        """Leaves the recovered file in the twin; what was gained."""
        say(f"recovery is judged by {self.split.about}")
        target, progress = self._target(), self.progress
        held = self._chunks(torch.tensor(self.split.held))
        if progress.before is None:
            progress.before = self._measure(self._file(self.base.path), target, held)
            progress.save()
        self._train(target, held)
        ranks.agree(lambda: self._begin(twin))
        best = Student(self.student.weights, self.student.tuned.at(self.values.best()), self.original.dtype)
        text = torch.tensor(sorted({int(i) for batch in self.batches for i in batch}))
        tokens, spill = self.tokens[self._chunks(text)], self._spill("encode")
        encode_again(best, tokens, self._room_of(tokens), spill, twin)
        after = self._measure(self._file(twin.folder / self.base.path.name), target, held)
        say(f"recovery: KLD on {self.split.about}: {progress.before:.4f} -> {after:.4f}, after {progress.best} steps")
        if after >= progress.before:
            say("recovery: no gain on text that it was not tuned on; the file stays as it was")
            ranks.agree(lambda: twin.restore(self.values.layer_of))
        return {
            "kld_before": progress.before,
            "kld_after": after,
            "steps": progress.best,
            "moves": self.how.moves,
            "judged_by": self.split.about,
            "measured": progress.measured,
        }

    def _begin(self, twin: Twin) -> None:
        """The base's bytes, in which nothing is encoded again yet, unless an earlier run has begun that and its bytes
        are there."""
        spill, layers = self._spill("encode"), range(self.original.config.n_layer, -1, -1)
        done = next((layer for layer in layers if spill.has(inputs(layer))), 0)
        if not twin.resumed(spill, done, self.values.specs):
            _clear([spill.folder])
            twin.copy()

    def _room_of(self, tokens: torch.Tensor) -> Room:
        return room_for(self.original, tokens.numel(), self.how.limits(self.state))

    def _file(self, path: Path) -> Source:
        """A file in which nothing moves, read as the student is."""
        weights, nothing = open_gguf(path, self.original.device), Values(self.state, {}, torch.float32)
        tuned = Tuned(weights.file, self.original.checkpoint, nothing, self.original.device)
        return Student(weights, tuned, self.original.dtype)

    def _target(self) -> Target:
        """The original's hidden states, from a pass that an earlier run may have begun or done."""
        spill, room, n_layer = self._spill("original"), self._room_of(self.tokens), self.original.config.n_layer
        with track("original", n_layer, "layers") as advance:
            forward(self.original, self.tokens, room, spill, advance=advance)
        return Target.load(self.original, self.tokens.shape, room.hidden, spill)

    @torch.no_grad()
    def _measure(self, source: Source, target: Target, held: torch.Tensor) -> float:
        tokens = self.tokens[held]
        return measure(source, tokens, target, held, self._room_of(tokens))

    def _train(self, target: Target, held: torch.Tensor) -> None:
        progress, how = self.progress, self.how
        per_step = 2 * self.student.config.n_layer
        with track("recover", how.steps * per_step, "layers") as advance:
            advance(progress.step * per_step, before=True)
            while progress.step < how.steps:
                self._judge(target, held)
                if progress.over:
                    return
                self._step(target, advance)
            self._judge(target, held)

    def _judge(self, target: Target, held: torch.Tensor) -> None:
        """Measures if it is time, and keeps the best."""
        step, progress = self.progress.step, self.progress
        due = step % self.how.every == 0 or step == self.how.steps
        if not due or step in progress.measured:
            return
        progress.measured[step] = self._measure(self.student, target, held)
        if progress.best == step:
            ranks.agree(self.values.keep)
        progress.save()
        say(f"after {step} steps: KLD {progress.measured[step]:.4f} on text that it is not tuned on")

    def _step(self, target: Target, advance: Advance) -> None:
        progress = self.progress
        name = f"step-{progress.step:03}"
        ranks.agree(lambda: _clear([old for old in self.state.glob("step-*") if old.name != name]))
        spill = self._spill(name)
        chunks = self._chunks(self.batches[progress.step])
        step = TrainingStep(self.student, self.tokens[chunks], chunks, target, self.room, spill)
        kld = step.run(self.how.update(progress.step), advance)
        progress.step += 1
        progress.save()
        ranks.agree(spill.remove)
        if kld is not None:
            say(f"step {progress.step} of {self.how.steps}: KLD {kld:.4f} before it, on its own text")


def recover(
    base: Path,
    folder: Path,
    original: CheckpointSource,
    chunks: Chunks,
    job: str,
    how: RecoverOptions | None = None,
    done: Callable[[list[Path], Mapping[str, Any]], None] = lambda files, gained: None,
) -> tuple[list[Path], Mapping[str, Any]]:
    """Write the recovered twin of the file (or splits) `base` into another folder; the files, and what was gained.

    chunks: calibration text. job: identity of base file and text; a stopped run of the same job goes on within the
    layer. done: is told of both, on rank 0, before the state of the job goes.

    Ranks share the work. If text that was not tuned on does not gain, the twin is a plain copy. What memory or disk
    have no room for is refused by `open_original`, before the base is made.
    """
    state = folder / (base.name + STATE)
    how = _as_begun(how or RecoverOptions(), state, partial(_identity, job, chunks))
    job = _identity(job, chunks, how)
    if why := ranks.agree(lambda: _useless(state, job)):
        say(f"{why}; recovery begins anew")
        ranks.agree(lambda: _clear([state]))
    with torch.inference_mode(False):
        work = Recovery(base, original, chunks, how, state, job)
        twin = Twin(work.base, state / "twin")
        gained = work.run(twin)
    files = [folder / file.name for file in twin.files]
    ranks.agree(lambda: twin.publish(folder))
    ranks.agree(lambda: done(files, gained))
    ranks.agree(lambda: _clear([state]))
    return files, gained


def _identity(job: str, chunks: Chunks, how: RecoverOptions) -> str:
    return hashlib.sha256(f"{job} {how} {chunks.domains} {FORMAT}".encode()).hexdigest()


def _as_begun(how: RecoverOptions, state: Path, job_of: Callable[[RecoverOptions], str]) -> RecoverOptions:
    """As the state there was begun, if that differs only in whether the scales of experts move: the disk decided that
    (`open_original`), and may have another mind now."""
    other = replace(how, moves="matrices" if how.moves == "experts" else "experts")
    mark = state / "job"
    if how.moves == "vectors" or not ranks.agree(lambda: mark.exists() and mark.read_text() == job_of(other)):
        return how
    say(f"recovery goes on as it was begun: scales of routed experts {'move' if other.moves == 'experts' else 'stay'}")
    return other


def _useless(state: Path, job: str) -> str | None:
    """Why a job cannot go on with this state, if there is one: it is another's, or something is damaged that cannot be
    computed again, because what it was made of has moved since."""
    mark = state / "job"
    if not mark.exists():
        return f"{state}: not a state" if state.exists() and any(state.iterdir()) else None
    if mark.read_bytes() != job.encode():
        return f"{state}: of another recovery"
    files = (path for path in sorted(state.rglob("*")) if path.is_file())
    for path in files:
        kind = path.relative_to(state).parts[0]
        temporary = path.suffix in (".part", ".tmp")
        if kind not in (*RECOMPUTED, "twin") and path.name != "job" and not temporary and (why := sealed.whole(path)):
            return why
    return None


def _clear(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def open_original(
    checkpoint: Checkpoint, plan: Plan, device: str, text: TextChoice, folder: Path, how: RecoverOptions
) -> tuple[CheckpointSource, RecoverOptions]:
    """The original as recovery reads it: float32 on the CPU, bfloat16 on a GPU; and what moves, if the disk of the
    folder (it exists) has no room for the scales of experts. Says what recovering a file of this plan on so much text
    takes; QuantkitError if memory or the disk has no room for that."""
    source = CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)
    only_forward(source.config, "--recover")
    if checkpoint.origin:
        say("recovery reads the matrices of the original twice a step: download it (hf download) if its cache is small")
    most = 2 * how.steps * how.tokens
    n_tokens = min(text.n_tokens or most, most)
    text_and_file = n_tokens, plan.n_bytes
    moves = ranks.agree(lambda: as_disk_allows(how, source.config, plan.by_name, text_and_file, folder))
    how = replace(how, moves=moves)
    sizes = Sizes.of(source.config, plan.by_name, how)
    sizes.check_disk(n_tokens, plan.n_bytes, folder)
    shape = max(1, min(n_tokens, how.tokens) // text.chunk), text.chunk
    sizes.room(source, shape, how.limits(folder), gradients.memory(source, 1, text.chunk))
    return source, how
