"""What `make` can be told, what that amounts to for one model and folder, and how a folder records it."""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import __version__, machine, ranks
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import LEAST, Calibration, sized
from quantkit.encoding.api import choose
from quantkit.encoding.moments import GROUP_SHARE
from quantkit.errors import QuantkitError
from quantkit.formats import gradients
from quantkit.formats.byte_source import open_regular, read_text
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_encode import encode_metadata
from quantkit.job.asked import check_encoder
from quantkit.job.folder import IMATRIX, PROVENANCE
from quantkit.job.work import SMALL_WEIGHTS, Work
from quantkit.machine import free_vram
from quantkit.models import family
from quantkit.models.open import see_like
from quantkit.planning import targets
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.damage import PUBLISHED
from quantkit.planning.metadata import file_metadata
from quantkit.planning.plan import Plan

A_DAY = 24 * 3600  # seconds, by the forecast, that nobody waits for unasked
ENCODERS = ("auto", "quantkit", "ggml")


@dataclass(frozen=True)
class MakeOptions:
    """Everything `make` can be told; the defaults are what a person gets who tells it nothing.

    recipe: a name, a TOML file or a plan.json. target: instead of the recipe's, `llama.cpp` or `llama.cpp/combined`.
    imatrix: importance to use, not measure. encoder: auto, quantkit or ggml; effort: fast, normal or best, for
    quantkit's; gradients: folder of a backward pass, likewise. device: cpu or cuda, default a GPU if there is one.
    split_max_bytes: of one file. restart: discard what an interrupted run left. recover: tune afterwards. verify: end
    with the scores; baseline: and with those of the same types by ggml's encoder. dry_run: the command line only says
    what it would take. mtp: with the layers that predict the token after the next, where llama.cpp reads them.
    """

    recipe: str | Path | None = None
    target: str | None = None
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: TextChoice = field(default_factory=lambda: TextChoice(n_tokens=32768))
    imatrix: Path | None = None
    encoder: str = "auto"
    effort: str = "normal"
    gradients: Path | None = None
    device: str | None = None
    split_max_bytes: int | None = None
    restart: bool = False
    verify: bool = True
    recover: bool = False
    baseline: bool = False
    dry_run: bool = False
    mtp: bool = True

    def with_length(self, checkpoint: Checkpoint, device: str) -> "MakeOptions":
        """With so much calibration text as the model wants, if nobody said how much."""
        how, config = self.calibration, family.from_hf(checkpoint.config)
        text = sized(how.text, config, torch.device(device), how.memory)
        return replace(self, calibration=replace(how, text=text))

    def chosen_encoder(self, work: Work, before: str | None = None) -> str:
        """quantkit or ggml. `auto`: what a stopped run of the same folder took before; else ours, unless that would
        take more than A_DAY, which it can on a CPU."""
        if self.encoder not in ENCODERS:
            raise QuantkitError(f"--encoder {self.encoder}: unknown; choose {', '.join(ENCODERS)}")
        if self.gradients and (self.encoder == "ggml" or self.effort == "fast" or self.imatrix):
            raise QuantkitError("ggml's encoder, effort fast and an imatrix have no use for gradients (leave them out)")
        check_encoder(self.encoder, self.imatrix)
        if self.imatrix:
            return "ggml"
        if self.encoder != "auto":
            return self.encoder
        if work.on_gpu or work.n_weights <= SMALL_WEIGHTS:
            return "quantkit"
        return before or ("quantkit" if work.seconds_to_encode("quantkit", self.effort) <= A_DAY else "ggml")


@dataclass(frozen=True)
class Order:
    """What is to be made of which model, and where: what was asked for, with everything opened and decided.

    encoder: quantkit or ggml. identity: what the imatrix and the file of this run depend on, and nothing that may
    change between reruns.
    """

    checkpoint: Checkpoint
    plan: Plan
    options: MakeOptions
    device: str
    folder: Path
    encoder: str
    identity: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Checkpoint, plan: Plan, options: MakeOptions, device: str, folder: Path) -> "Order":
        """With its identity, which later decisions (types, gradients) do not change. From here on the checkpoint is
        seen as of the architecture that the plan is for."""
        see_like(checkpoint, plan.by_name)
        order = cls(checkpoint, plan, options, device, folder, "")
        before = None if options.restart else packed_by(folder, plan)
        order = replace(order, encoder=options.chosen_encoder(order.work, before))
        return replace(order, identity=order._identify())

    @property
    def out(self) -> Path:
        """The finished GGUF; splits are named after it."""
        return self.folder / f"{self.plan.model}-{self.plan.recipe}.gguf"

    @property
    def imatrix(self) -> Path:
        """The importance that the run measures."""
        return self.folder / IMATRIX

    @property
    def work(self) -> Work:
        """The order in numbers."""
        options = self.options
        tokens = 0 if options.imatrix else options.calibration.text.n_tokens or 0
        judged = (options.evaluation.n_tokens or 0) if options.verify else 0
        n_weights = sum(tensor.n_weights for tensor in self.plan.tensors)
        config = family.from_hf(self.checkpoint.config)
        return Work(config, n_weights, tokens, judged, self.device != "cpu", machine.threads())

    @property
    def known_outputs(self) -> str:
        """The gradients that matrices are encoded by, if any."""
        return f" {gradients.digest(self.options.gradients)}" if self.options.gradients else ""

    @property
    def estimates(self) -> bool:
        """Whether types are to be chosen by an estimate for this model: at effort `best`, within a budget, without a
        measurement."""
        open_types = self.plan.outlook is not None and not str(self.options.recipe).endswith(".json")
        return (
            open_types
            and self.options.effort == "best"
            and self.options.budget.measured is None
            and self.encoder == "quantkit"
        )

    def memory_beside_encoder(self, n_tokens: int) -> int | None:
        """Bytes that the pass may take, if it is told: as given; with many tokens on a GPU what our encoder leaves of
        it, so that their hidden states go to RAM before experts wait for room."""
        given = self.options.calibration.memory
        if given is not None or n_tokens <= LEAST or self.device == "cpu" or self.encoder == "ggml":
            return given
        total = torch.cuda.get_device_properties(self.device).total_memory
        return free_vram(torch.device(self.device)) - int(GROUP_SHARE * total)

    def _identify(self) -> dict[str, Any]:
        checkpoint, plan, options = self.checkpoint, self.plan, self.options
        how = options.calibration
        measured = {
            "text": as_json(how.text),
            "min_expert_tokens": how.min_expert_tokens,
            "expert_tokens": how.expert_tokens,
        }
        by_imatrix = {"imatrix": str(options.imatrix), "imatrix_sha256": _sha256(options.imatrix)}
        facts = {
            "quantkit": __version__,
            "checkpoint": checkpoint.fingerprint(),
            "recipe": plan.recipe,
            "target": plan.target,
            "mla": plan.mla,
            "plan": "by gradients, " + plan.outlook.limit if self.estimates and plan.outlook else plan.digest(),
            "calibration": by_imatrix if options.imatrix else measured,
            "calibration_sha256": None if options.imatrix else how.text.corpus("calibration").digest,
            "encoder": options.encoder,
            "effort": options.effort,
            "recover": options.recover,
            "metadata": metadata_digest(checkpoint, plan),
            "split_max_bytes": self._splits_at(),
            "arithmetic": arithmetic(self.encoder, self.device),
        }
        if checkpoint.origin:
            facts["weights"] = checkpoint.origin["weights"]
        if options.gradients and self.encoder == "quantkit":
            facts["gradients"] = gradients.digest(options.gradients)
        return facts

    def _splits_at(self) -> int | None:
        """The limit of a file's size, if it makes splits."""
        limit = self.options.split_max_bytes
        return limit if limit is not None and limit < self.plan.n_bytes else None

    def circumstances(self) -> dict[str, Any]:
        """What a reader wants to know, or needs to make the same again, besides the identity."""
        options = self.options
        facts = {
            "command": _command(),
            "model": self.checkpoint.name,
            "source": self.checkpoint.origin,
            "revision": source_revision(Path(self.checkpoint.path)),
            "packed_by": self.encoder,
            "evaluation": as_json(options.evaluation) if options.verify else None,
            "device": self.device,
            "ranks": ranks.count() if ranks.count() > 1 else None,
            "caveats": self.caveats() or None,
        }
        return {key: value for key, value in facts.items() if value is not None}

    def caveats(self) -> list[str]:
        """What the target, or llama.cpp, which many will run the file with, computes wrongly in this model."""
        config = family.from_hf(self.checkpoint.config)
        of_each = (targets.caveats(target, config) for target in dict.fromkeys((self.plan.target, "llama.cpp")))
        return [line for lines in of_each for line in lines] + owed(self.plan)


def packed_by(folder: Path, plan: Plan) -> str | None:
    """The encoder that `auto` was in the job of this plan which lies in a folder; None if there is none."""
    try:
        record = json.loads(read_text(folder / PROVENANCE, "record"))
        same = (record["encoder"], record["plan"]) == ("auto", plan.digest())
        return str(record["packed_by"]) if same and record["packed_by"] in ENCODERS[1:] else None
    except (QuantkitError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _command() -> str:
    """What began the job: the command line, or a call from Python, of which arguments of the process say nothing."""
    program = Path(sys.argv[0])
    called = program.stem == "quantkit" or program.parts[-2:] == ("quantkit", "__main__.py")
    return shlex.join(["quantkit", *sys.argv[1:]]) if called else "quantkit.make, called from Python"


def owed(plan: Plan) -> list[str]:
    """A line for a model card if types were chosen by what others published: they ask to be named."""
    if plan.outlook is None or not plan.outlook.damage.startswith(PUBLISHED):
        return []
    return [f"Types chosen by {plan.outlook.damage} (https://github.com/Thireus/GGUF-Tool-Suite)"]


def metadata_digest(checkpoint: Checkpoint, plan: Plan) -> str:
    """sha256 of what the file will say of the model: its numbers, tokenizer and chat template."""
    metadata = file_metadata(Path(checkpoint.path), family.from_hf(checkpoint.config), plan)
    return hashlib.sha256(b"".join(encode_metadata(metadata))).hexdigest()


def arithmetic(encoder: str, device: str) -> str:
    """What the last bits of a file depend on: the back end, and the processor's instructions or the GPU."""
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{type(choose(device)).__name__ if encoder == 'quantkit' else 'ggml'}, {processor}"


def _sha256(path: Path | None) -> str | None:
    if path is None:
        return None
    with os.fdopen(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_json(text: TextChoice) -> dict[str, Any]:
    """As it reads when it comes back from a file: lists, no tuples."""
    return json.loads(json.dumps(asdict(text)))


def source_revision(folder: Path) -> str | None:
    """The commit on the Hub that a downloaded folder is, from where huggingface_hub notes it."""
    if folder.resolve().parent.name == "snapshots":
        return folder.resolve().name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return read_text(note, "record").split("\n", 1)[0] if note.is_file() else None
