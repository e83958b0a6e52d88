"""`compare`: files of anybody side by side: what `headers` says of them, and how far each is from the original on the
same tokens.

The original goes through the text once, then each file by itself: one model is read at a time. What is done lies in
the folder of the results under a name that says of what (file, original, text, program), so that a stopped run goes on,
and a file that is added later is compared with what is there.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__
from quantkit.calibration.corpus import Chunks, Corpus, TextChoice, cut
from quantkit.errors import QuantkitError, printable
from quantkit.evaluation.divergence import Divergence, difference
from quantkit.evaluation.reference import ReferencePass
from quantkit.evaluation.side_by_side import NotFinite
from quantkit.evaluation.verify import (
    check_same_model,
    checked_dtype,
    likelihood,
    scored_of_chunk,
    scores,
    ungrouped,
    verify,
)
from quantkit.formats import sealed
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.whole_file import make_folders
from quantkit.job.headers import Opened, tables
from quantkit.job.stages import check_cut_alike, source_of
from quantkit.progress import say, track
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import Source
from quantkit.sizes import both_units


@dataclass(frozen=True)
class CompareOptions:
    """text: what files are scored on. folder: where results and what is done of them lie. ram: bytes that the streams
    may use, default what the machine has."""

    text: TextChoice
    folder: Path
    device: str = "cpu"
    ram: int | None = None


@torch.inference_mode()
def scored_tables(files: Sequence[Opened], reference: Checkpoint | None, how: CompareOptions) -> dict[str, Any]:
    """`tables` with the scores of every file that is computed here: perplexity, and with a reference the divergence
    from it; and `differences`, what each has more than another on the same tokens. A file that is not computed says
    why; without a reference that is one of another model than the first."""
    found = tables(files)
    text = how.text.corpus("evaluation")
    original = source_of(reference, how.device) if reference else None
    leader: Source | None = original
    computed = []
    for i, one in enumerate(files):
        if source := _admitted(one, found["files"][i], leader, text, how.device):
            computed.append((i, one))
            leader = leader or source
    if not computed or leader is None:
        return found
    chunks = cut(text, leader, how.text)
    about = {"reference": original.name if original else None, "text": text.name, "text_sha256": text.digest}
    shape = {"chunks": len(chunks.tokens), "chunk_length": chunks.tokens.shape[1], "score": "half"}
    make_folders(how.folder)
    theirs = _Theirs(original, chunks, how) if original else None
    results: dict[int, Divergence] = {}
    for number, (i, one) in enumerate(computed):
        try:
            results[i] = _scored(one, theirs, chunks, how, f"{number + 1} of {len(computed)}")
        except NotFinite as error:
            _not_computed(one, found["files"][i], error)
            continue
        found["files"][i]["scores"] = _figures(results[i], chunks, original is not None)
    measured = ("kld", "top1", "nll") if original else ("nll",)
    for a, b in combinations(results, 2):
        more = difference(results[a], results[b], scored_of_chunk(chunks))
        found["differences"].append({"of": b, "from": a} | {key: more[key] for key in measured})
    return found | about | shape


def _figures(found: Divergence, chunks: Chunks, with_original: bool) -> dict[str, Any]:
    """The scores of verify.json, and `nll`; without an original those that a file has by itself."""
    figures = scores(found, chunks)
    if with_original:
        return figures | {"nll": math.log(figures["ppl"])}
    domains = {name: _own(part) for name, part in figures["domains"].items()}
    return _own(figures) | {"domains": domains}


def _own(figures: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: figures[key] for key in ("tokens", "ppl", "ppl_error")}
    return kept | {"nll": math.log(kept["ppl"]), "ci95": {"ppl": figures["ci95"]["ppl"]}}


def _admitted(
    one: Opened, facts: dict[str, Any], leader: Source | None, text: Corpus, device: str
) -> GGUFSource | None:
    """The file, if it can be computed and is of the leader's model; if not, its facts say why."""
    try:
        source = open_source(one.file, device)
        if leader:
            check_same_model(source, leader)
            check_cut_alike(source, leader, text, one.path)
            facts["notes"] += filter(None, [ungrouped(source, leader)])
    except QuantkitError as error:
        _not_computed(one, facts, error)
        return None
    return source


def _not_computed(one: Opened, facts: dict[str, Any], error: QuantkitError) -> None:
    facts["not_computed"] = str(error).removeprefix(f"{one.path}: ").removeprefix(f"{one.path.name}: ")
    say(f"{one.path.name} is not computed: {facts['not_computed']}")


class _Theirs:
    """The original's side: its states after the last layer, computed when a file first needs them, and kept."""

    def __init__(self, source: Any, chunks: Chunks, how: CompareOptions):
        self.source, self.chunks, self.how = source, chunks, how
        self.key = _key(source.fingerprint(), source.device.type, str(source.dtype), _digest(chunks))
        self.path = how.folder / f"original-{self.key}.safetensors"
        self._states: torch.Tensor | None = None

    def states(self) -> torch.Tensor:
        """float32 [n, width], of the scored tokens."""
        if self._states is None and self.path.exists() and not sealed.whole(self.path):
            with sealed.reading(self.path) as file:
                self._states = file.get_tensor("states").to(self.source.device)
        if self._states is None:
            self._states = self._passed()
        return self._states

    def _passed(self) -> torch.Tensor:
        n_tokens, n_layer = self.chunks.tokens.numel(), self.source.config.n_layer
        checked_dtype(self.source, n_tokens, self.how.ram)  # refuses what does not fit, before
        going = ReferencePass(self.source, self.chunks, self.how.folder / f"original-{self.key}")
        say(f"the original first: {both_units(sum(self.source.layer_bytes()))} are read, layer by layer")
        with track("original", n_layer * n_tokens / 1e3, "ktoken-layers") as advance:
            advance(going.done * n_tokens / 1e3, before=True)
            for layer in range(going.done, n_layer):
                going.advance(layer + 1)
                advance(n_tokens / 1e3, f"layer {layer + 1} of {n_layer}")
        states = going.scored()
        sealed.write(self.path, {"states": states})
        going.state.remove()
        return states


def _scored(one: Opened, theirs: _Theirs | None, chunks: Chunks, how: CompareOptions, at: str) -> Divergence:
    """Token by token; what an earlier run noted is taken."""
    source: GGUFSource = open_source(one.file, how.device)
    of = source.fingerprint(), _first_rows(one.file)
    key = _key(*of, theirs.key if theirs else "alone", source.device.type, _digest(chunks))
    note = how.folder / f"tokens-{key}.safetensors"
    names = [field.name for field in fields(Divergence)]
    if note.exists() and not sealed.whole(note):
        with sealed.reading(note) as file:
            kept = {name: file.get_tensor(name) for name in names}
        say(f"{one.path.name} ({at}): scored by an earlier run")
        return Divergence(**(kept | {"same_top": kept["same_top"].bool()}))
    say(f"{one.path.name} ({at}): {both_units(one.file.n_bytes)} are read, layer by layer")
    if theirs:
        found = verify(source, theirs.source, chunks, ram=how.ram, known=theirs.states()).found
    else:
        found = likelihood(source, chunks, ram=how.ram)
    kept = {name: getattr(found, name) for name in names}
    sealed.write(note, {**kept, "same_top": found.same_top.int()}, {"file": printable(one.path.name)})
    return found


def _first_rows(file: GGUFFile) -> str:
    """Of every tensor's first row: files of one name, size and time lie in different folders. R1's take seconds."""
    digest = hashlib.sha256()
    for name in file.tensors:
        data = file.data(name)
        digest.update(data[(0,) * (data.ndim - 1)].tobytes())
    return digest.hexdigest()


def _digest(chunks: Chunks) -> str:
    return hashlib.sha256(f"{tuple(chunks.tokens.shape)}".encode() + chunks.targets.numpy().tobytes()).hexdigest()


def _key(*facts: str) -> str:
    """Of what a note says something: also of this program, whose arithmetic may change."""
    return hashlib.sha256(json.dumps([__version__, *facts]).encode()).hexdigest()[:16]
