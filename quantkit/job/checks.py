"""What would stop a long job at its end is looked for before it begins: nothing here reads weights."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit import __version__, machine, ranks
from quantkit.calibration.corpus import TextChoice, cut, overlap
from quantkit.calibration.state import PassState
from quantkit.errors import QuantkitError
from quantkit.evaluation import configuration
from quantkit.evaluation.verify import checked_dtype
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.resume import begun
from quantkit.models.config import ModelConfig
from quantkit.planning.plan import Plan
from quantkit.progress import say
from quantkit.runtime.layers import only_forward
from quantkit.runtime.memory import Limits, room_for
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.sizes import both_units

if TYPE_CHECKING:
    from quantkit.job.options import Order

MOST_OVERLAP = 0.05  # of evaluation lines: separators, licences and boilerplate recur in unrelated texts
Check = Callable[[], object]
LARGE = 200_000_000  # weights: from here on a look at the configuration is short beside the job; `certify` always looks


def check_ranks(checkpoint: Checkpoint, plan: Plan, device: str) -> None:
    """Refuse, before any work, ranks that cannot do one job together."""
    if ranks.count() == 1:
        return
    if checkpoint.origin:
        raise QuantkitError(
            f"{checkpoint.path}: several ranks read a model from a folder that they all see; download "
            "it first (hf download)"
        )
    ranks.same(checkpoint.fingerprint(), "checkpoint")
    ranks.same(device, "device")
    ranks.same(__version__, "version of quantkit")
    ranks.same(plan.digest(), "plan")


def check_disjoint(calibration: TextChoice, evaluation: TextChoice) -> None:
    """Figures measured on text that was calibrated on would flatter; refuse them."""
    share = overlap(calibration.corpus("calibration"), evaluation.corpus("evaluation"))
    if share > MOST_OVERLAP:
        raise QuantkitError(
            f"{share:.0%} of the evaluation text's long lines also stand in the calibration text; "
            "choose other text with --eval-data"
        )


def check_backward(config: ModelConfig, recover: bool, best: bool) -> None:
    """Refuse what needs a backward pass of a model that has none here. best: whether our encoder works so hard."""
    for asked, what in ((recover, "--recover"), (best, "--effort best")):
        if asked:
            only_forward(config, what)


def check_possible(
    source: CheckpointSource, plan: Plan, folder: Path, n_bytes: int, evaluation: TextChoice | None
) -> None:
    """The first of `each_possible` that is not."""
    for check in each_possible(source, plan, folder, n_bytes, evaluation):
        check()


def each_possible(
    source: CheckpointSource, plan: Plan, folder: Path, n_bytes: int, evaluation: TextChoice | None
) -> list[Check]:
    """QuantkitError if the disk has no room for the file, of n_bytes, if the evaluation text is none (None: there will
    be no evaluation), if the two streams of the evaluation do not fit in memory, or if transformers reads the
    configuration of a large model in another way. source: the original, where it is to be computed."""
    checks = [partial(_check_disk, folder, n_bytes)]
    checks += [partial(_check_evaluation, source, evaluation)] if evaluation else []
    return [*checks, *([partial(_check_configuration, source)] if is_large(plan) else [])]


def _check_evaluation(source: CheckpointSource, text: TextChoice) -> None:
    """Its text, and memory for its two streams."""
    chunks = cut(text.corpus("evaluation"), source, text)
    if ranks.local_count() > 1:  # rank 0 will have the memory of all when it verifies alone
        return
    try:
        checked_dtype(source, chunks.tokens.numel(), None)
    except QuantkitError as error:
        raise QuantkitError(f"evaluation: {error}; choose fewer --eval-tokens or --no-verify") from None


def _check_configuration(source: CheckpointSource) -> None:
    found = configuration.check(source.checkpoint.config)
    if found.status == "fail":
        raise QuantkitError(f"{source.checkpoint.path}: {found.detail}")
    say(found.detail)


def is_large(plan: Plan) -> bool:
    """Whether the model is so large that seconds for its configuration do not matter."""
    return sum(tensor.n_weights for tensor in plan.tensors) > LARGE


def _check_disk(folder: Path, need: int) -> None:
    """Only where nothing lies yet: a run that goes on has reserved its place."""
    absolute = folder.absolute()
    if any(absolute.glob("*.gguf*")) or any(absolute.glob("*/*.gguf*")):
        return
    if (free := machine.free_disk(folder)) < need:
        raise QuantkitError(
            f"{folder}: no room for {both_units(need)}; free are {both_units(free)}; choose another --output"
        )


def room_of_pass(
    order: "Order", source: CheckpointSource, n_tokens: tuple[int, int], state: PassState, n_bytes: int
) -> Room:
    """Where hidden states of the pass that measures and encodes live. n_tokens: of it, and of an evaluation that runs
    along. n_bytes: of the file. QuantkitError if memory has no room, or the disk none for the pass's state beside the
    file, unless a run has reserved that."""
    (own, compared), options = n_tokens, order.options
    limits = Limits(order.memory_beside_encoder(own), options.calibration.hidden, state.folder.parent, compared)
    room = room_for(source, own, limits)
    left = 0 if begun(state.folder.with_suffix("")) else n_bytes
    state.check_disk(own * source.config.width * room.hidden.itemsize, left)
    return room


def state_of(out: Path, job: str = "") -> PassState:
    """Where the pass that writes `out` keeps what it needs to go on."""
    return PassState(out.with_name(out.name + ".state"), job)
