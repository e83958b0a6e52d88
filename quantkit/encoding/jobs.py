"""Checkpoint, plan and importance -> GGUF. Jobs are row ranges of planned tensors and may finish in any order."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quantkit import machine, ranks
from quantkit.codecs.types import TABLE
from quantkit.errors import QuantkitError
from quantkit.formats import fp4, int4
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.formats.imatrix import fit
from quantkit.formats.resume import existing_files
from quantkit.ggml import quants
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.gguf_checkpoint import GGUFCheckpoint
from quantkit.planning.metadata import file_metadata
from quantkit.planning.plan import Plan, PlannedTensor
from quantkit.progress import Advance, say, track
from quantkit.tensors import Imatrix, Importance, TensorSpec


class Encoder(Protocol):
    """float32 rows in, packed ggml blocks out. name goes into the file's provenance. Called from several threads."""

    name: str

    def __call__(self, qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """rows float32 [n, n_in] of one matrix, importance float32 [n_in] -> uint8 [n, row_bytes]."""


class GgmlEncoder:
    """ggml's reference encoder, byte for byte llama-quantize's result."""

    name = "ggml"

    def __call__(self, qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        return quants.quantize(qtype, rows, importance)


@dataclass(frozen=True)
class Output:
    """The file that is to be written, in one or in splits.

    fingerprint: named digests of what the bytes depend on; what another run left is resumed only under the same.
    metadata: keys besides those of model and plan. restart: throw away what another run left. overwrite: replace a
    finished file of that name, once the new one is complete. keep_ledger: as in `GGUFWriter.open`.
    """

    path: Path
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    split_max_bytes: int | None = None
    restart: bool = False
    overwrite: bool = False
    keep_ledger: bool = False


@dataclass(frozen=True)
class Job:
    """Rows start:stop of one planned tensor, within one of its matrices."""

    spec: TensorSpec
    tensor: PlannedTensor
    start: int
    stop: int

    @property
    def matrix(self) -> int:
        """Which of the tensor's matrices the rows are of."""
        return self.start // (self.spec.n_rows // self.spec.n_matrices)


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix: Imatrix,
    output: Output,
    encoder: Encoder,
    *,
    workers: int | None = None,
    after_layer: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the planned file and return its path(s). An interrupted run goes on where it stopped.

    imatrix: as `fit_importance` returns it for this plan. after_layer: called when a layer's tensors are written, with
    the number of layers that are.
    """
    output = replace(output, fingerprint=dict(output.fingerprint) | {"encoder": encoder.name})
    with open_writer(checkpoint, plan, output) as out:
        n_weights = sum(tensor.n_weights for tensor in plan.tensors)
        with track("quantize", n_weights / 1e6, "Mweights") as advance:
            for part, done in by_layer(plan):
                encode_pending(checkpoint, part, imatrix, out, encoder, workers, advance)
                if after_layer and done is not None:
                    after_layer(done)
    return out.files


def by_layer(plan: Plan) -> Iterator[tuple[Plan, int | None]]:
    """The plan in the order in which a checkpoint is read: a plan for each layer and the number of layers done with it,
    then one (with None) for what is outside the layers."""
    for layer in range(1 + max((t.layer for t in plan.tensors if t.layer is not None), default=-1)):
        yield layer_plan(plan, layer), layer + 1
    yield layer_plan(plan, None), None


def layer_plan(plan: Plan, layer: int | None) -> Plan:
    """The plan's tensors of one layer; None: of no layer."""
    return replace(plan, tensors=tuple(tensor for tensor in plan.tensors if tensor.layer == layer))


def check_output(checkpoint: Checkpoint, path: Path) -> None:
    """QuantkitError if a file of this name would take the place of the original, which may be a GGUF itself."""
    original = {file.resolve() for file in checkpoint.file.files} if isinstance(checkpoint, GGUFCheckpoint) else set()
    if same := [file for file in existing_files(path) if file.resolve() in original]:
        raise QuantkitError(f"{same[0]} is the original, which this file would replace; choose another --output")


def open_writer(checkpoint: Checkpoint, plan: Plan, output: Output) -> GGUFWriter:
    """The file with its header and offsets, no data yet; or what an interrupted run left of it."""
    check_output(checkpoint, output.path)
    config = family.from_hf(checkpoint.config)
    checkpoint.validate(family.source_shapes(config))
    plan.check_model(family.specs(config, plan.mla))
    metadata = file_metadata(Path(checkpoint.path), config, plan) | dict(output.metadata)
    out = GGUFWriter.open(
        output.path,
        plan.tensors,
        metadata,
        fingerprint=output.fingerprint,
        split_max_bytes=output.split_max_bytes,
        restart=output.restart,
        overwrite=output.overwrite,
        keep_ledger=output.keep_ledger,
    )
    if done := sum(out.done(tensor.name, 0, prod(tensor.shape[:-1])) for tensor in plan.tensors):
        say(f"{out.path}: an earlier run wrote {done:,} of {len(plan.tensors):,} tensors; going on with the rest")
    return out


def encode_pending(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix: Imatrix,
    out: GGUFWriter,
    encoder: Encoder,
    workers: int | None = None,
    advance: Advance | None = None,
) -> None:
    """Write every row of the plan's tensors that is still missing. advance: told of each million weights.

    Ranks share the jobs; when this returns, all jobs of all ranks are on disk.
    Memory: each worker holds one job (up to a 64 MB slice or one expert as float32, and its bytes).
    """
    config = family.from_hf(checkpoint.config)
    specs = {spec.name: spec for spec in family.specs(config, plan.mla)}
    workers = workers or machine.threads()
    jobs = [job for tensor in plan.tensors for job in _jobs(specs[tensor.name], tensor, out)]
    prepare_types(replace(plan, tensors=tuple(job.tensor for job in jobs)))

    def work(job: Job) -> None:
        """One job, recorded before its worker takes the next: a crash costs at most one job per worker."""
        out.write(job.tensor.name, job.start, _encode(checkpoint, config, job, imatrix, encoder))
        out.sync()

    if advance:
        total = sum(tensor.n_weights for tensor in plan.tensors)
        advance((total - sum(map(_n_weights, jobs))) / 1e6, before=True)
    # Jobs of a tensor are alike and stand together, so every n-th of them is a fair share.
    with ThreadPoolExecutor(workers) as pool:
        for job in _run(pool, jobs[ranks.index() :: ranks.count()], work, workers):
            if advance:
                advance(ranks.count() * _n_weights(job) / 1e6)
    out.meet()


def prepare_types(plan: Plan) -> None:
    """ggml's tables for the plan's types: of IQ1_S and IQ1_M ten seconds of one core."""
    for qtype in sorted({tensor.qtype for tensor in plan.tensors}):
        quants.prepare(qtype)


def _n_weights(job: Job) -> int:
    return (job.stop - job.start) * job.spec.n_in


def _jobs(spec: TensorSpec, tensor: PlannedTensor, out: GGUFWriter) -> Iterator[Job]:
    for start, stop in out.pending(spec.name, family.slices(spec)):
        yield Job(spec, tensor, start, stop)


def _run(pool: ThreadPoolExecutor, jobs: list[Job], work: Callable[[Job], None], workers: int) -> Iterator[Job]:
    """Jobs as they are finished. At most two a worker are queued, so that the first error soon ends them all."""
    waiting = iter(jobs)
    running: dict[Future, Job] = {}
    try:
        while True:
            for job in waiting:
                running[pool.submit(work, job)] = job
                if len(running) >= 2 * workers:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                yield running.pop(future)
    finally:
        for future in running:
            future.cancel()


def _encode(checkpoint: Checkpoint, config: ModelConfig, job: Job, imatrix: Imatrix, encoder: Encoder) -> np.ndarray:
    first = job.matrix * (job.spec.n_rows // job.spec.n_matrices)
    name, start, stop = job.spec.sources[job.matrix % len(job.spec.sources)], job.start - first, job.stop - first
    if job.tensor.qtype == TABLE.name:
        return checkpoint.read_ids(name, start, stop, config.n_expert).numpy().view(np.uint8)
    if _is_copied(checkpoint, job, name):
        return (checkpoint.read_q4_0 if job.tensor.qtype == "Q4_0" else checkpoint.read_mxfp4)(name, start, stop)
    rows = family.read(checkpoint, config, job.spec, job.start, job.stop).numpy()
    entry = imatrix.get(job.tensor.name)
    importance = None if entry is None else entry.mean(job.matrix)
    return encoder(job.tensor.qtype, rows, importance)


COPIES = {"Q4_0": int4.DTYPE, fp4.COPY: fp4.DTYPE}
"""qtype -> the stored dtype whose numbers it says as they are."""


def _is_copied(checkpoint: Checkpoint, job: Job, name: str) -> bool:
    """Whether the source's codes are the job's, and there is nothing to encode."""
    whole = job.spec.assembly in ("copy", "stack")
    return whole and COPIES.get(job.tensor.qtype) == checkpoint.entry(name).dtype


def fit_importance(plan: Plan, imatrix: Imatrix) -> dict[str, Importance]:
    """The entries that this plan uses, in its tensors' shapes. Refused before any work if one is missing or misfits."""
    fitted = {}
    for tensor in plan.tensors:
        if len(tensor.shape) == 1:
            continue
        entry = imatrix.get(tensor.name)
        if entry is not None:
            n_matrices = tensor.shape[0] if len(tensor.shape) == 3 else 1
            fitted[tensor.name] = fit(entry, n_matrices, tensor.shape[-1], tensor.name)
        elif quants.requires_importance(tensor.qtype):
            raise QuantkitError(
                f"imatrix has no {tensor.name}, and {tensor.qtype} cannot be encoded without it: "
                "calibrate this model (quantkit calibrate)"
            )
    return fitted
