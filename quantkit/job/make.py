"""`quantkit make`, the whole story: plan, open, claim the folder, calibrate and encode in one pass, recover, verify.

Every stage is file to file: checkpoint -> imatrix -> plan -> GGUF -> scores. The contract of the folder is in
`folder`, what can be asked for in `options`, the stages that are commands too in `stages`.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit import ranks
from quantkit.calibration import coverage
from quantkit.calibration.collect import Steps, collect
from quantkit.calibration.corpus import cut
from quantkit.calibration.gradients import TOKENS, GradientOptions, calibrate_gradients
from quantkit.calibration.measure import calibrate
from quantkit.calibration.options import check_length
from quantkit.calibration.state import PassState
from quantkit.encoding.jobs import GgmlEncoder, Output, check_output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions
from quantkit.encoding.saved import KEPT_ROLE
from quantkit.errors import QuantkitError
from quantkit.evaluation.reference import ReferencePass
from quantkit.formats.byte_source import read_whole
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.formats.imatrix import save_imatrix
from quantkit.formats.lock import locked
from quantkit.formats.resume import begun, forget
from quantkit.formats.whole_file import write_json, write_text
from quantkit.job.asked import check_baseline
from quantkit.job.checks import (
    check_backward,
    check_disjoint,
    check_possible,
    check_ranks,
    is_large,
    room_of_pass,
    state_of,
)
from quantkit.job.finished import check_notes, difference, note, record, scored_before, write_scores
from quantkit.job.folder import (
    BASE,
    BASELINE,
    BASELINE_FILES,
    GRADIENTS,
    PLAN,
    RECIPE,
    RECOVERY,
    REFERENCE,
    SENSITIVITY,
    begin,
    finished_files,
    unclaim,
)
from quantkit.job.forecast import forecast
from quantkit.job.options import MakeOptions, Order
from quantkit.job.plan import file_bytes, plan_model, recipe_text
from quantkit.job.recovery.options import RecoverOptions
from quantkit.job.recovery.recover import STATE, open_original, recover
from quantkit.job.stages import (
    QuantizeOptions,
    SensitivityOptions,
    VerifyOptions,
    estimate_damage,
    imatrix_metadata,
    quantize_model,
    score_by_ggml,
    source_of,
    verify_file,
)
from quantkit.job.work import ON_GPU
from quantkit.machine import chosen_device
from quantkit.models.open import ModelRef, open_weights
from quantkit.planning.plan import Plan
from quantkit.progress import say, track
from quantkit.runtime.stream import job_of

ONE_PASS = "calibration"  # what the fingerprint of a file has that is written in one pass


def make(
    model: ModelRef | Path | str, folder: Path | None = None, options: MakeOptions = MakeOptions()
) -> tuple[list[Path], dict[str, Any] | None]:
    """The main job; returns the GGUF file(s) and what verify.json holds. The folder (default: MODEL-RECIPE here) is as
    `job.folder` says.

    What an earlier, interrupted run of the same job left there is used; that of another job is refused. Ranks
    calibrate, encode and recover together; then rank 0 alone verifies, and the others return without a result.
    """
    order = order_of(model, folder, options)
    new = not order.folder.exists()
    with locked(order.folder):
        try:
            files, result = make_in_folder(order, model)
        except QuantkitError:
            if new and ranks.index() == 0:
                unclaim(order.folder)
            raise
    order.checkpoint.close()
    return files, result


def order_of(model: ModelRef | Path | str, folder: Path | None, options: MakeOptions) -> Order:
    """What is asked for, with everything opened and decided; nothing is written. QuantkitError for what cannot be."""
    device, checkpoint = chosen_device(options.device), open_weights(model)
    options = options.with_length(checkpoint, device)
    plan = plan_model(model, options.recipe, options.target, options.budget, options.split_max_bytes, options.mtp)
    check_ranks(checkpoint, plan, device)
    if options.verify and not options.imatrix:
        check_disjoint(options.calibration.text, options.evaluation)
    order = Order.of(checkpoint, plan, options, device, folder or Path(f"{plan.model}-{plan.recipe}"))
    check_output(checkpoint, order.out)
    if options.baseline:
        check_baseline(order.encoder, options.recover, options.verify)
    check_backward(order.work.config, options.recover, options.effort == "best" and order.encoder == "quantkit")
    return order


def make_in_folder(order: Order, model: ModelRef | Path | str) -> tuple[list[Path], dict[str, Any] | None]:
    """`make`, when it is decided what and where, and nobody else is there."""
    checkpoint, plan, options, device = order.checkpoint, order.plan, order.options, order.device
    n_bytes, judged = file_bytes(checkpoint, plan, options.split_max_bytes), options.verify and options.evaluation
    source = source_of(checkpoint, device)
    ranks.agree(lambda: check_possible(source, plan, order.folder, n_bytes * (1 + options.baseline), judged or None))
    ranks.agree(lambda: claim_folder(order))
    # A local original is read once more to compare every layer; one on a Hub is downloaded once, for both.
    reference = reference_pass(order) if options.verify and checkpoint.origin else None
    if files := (found := earlier(order, order.out)):
        ranks.agree(lambda: check_notes(order.folder, order.identity))
        clear_left(order)
    else:
        for line in forecast(order, source, n_bytes):
            say(line)
        order = planned_by_damage(order, model)
        write = make_and_recover if options.recover else partial(make_file, out=order.out)
        files = write(order, reference=reference)
    ranks.leave()
    result = None
    if options.verify and ranks.index() == 0:
        how = VerifyOptions(options.evaluation, plan.target, configuration=is_large(plan))  # then known already
        result = scored_before(order.folder, options.evaluation) if found else None
        if result is None:
            result = verify_file(files[0], checkpoint, device, how, passed=reference)
            write_scores(order.folder, result, options.evaluation)
        if options.baseline:
            result["baseline"] = baseline(order, reference)
    if reference:
        reference.state.remove()
    return files, result


def baseline(order: Order, reference: ReferencePass | None) -> dict[str, Any]:
    """Scores of the same types by ggml's encoder, measured once and kept in BASELINE; of rank 0, at the end."""
    folder, evaluation = order.folder, order.options.evaluation
    if (scores := scored_before(folder, evaluation, BASELINE)) is None:
        plan = Plan.from_json(read_whole(folder / PLAN, "plan"), str(folder / PLAN))
        out, imatrix = folder / BASELINE_FILES / order.out.name, order.options.imatrix or order.imatrix
        scores = score_by_ggml(order.checkpoint, plan, imatrix, out, order.device, evaluation, reference)
        write_scores(folder, scores, evaluation, BASELINE)
    return scores


def claim_folder(order: Order) -> None:
    """The folder is this order's from here on; its plan lies there, and the rules that it came from."""
    asked, texts = order.options, {} if order.estimates else {PLAN: order.plan.to_json()}
    if (rules := recipe_text(asked.recipe, asked.budget, order.work.config, order.plan.mla)) is not None:
        texts[RECIPE] = rules
    begin(order.folder, order.identity, order.circumstances(), texts, asked.restart, asked.imatrix)


def earlier(order: Order, path: Path) -> list[Path]:
    """The file(s) of that name that an earlier run of this job finished, as rank 0 finds them; none if they are to be
    made anew."""

    def look() -> list[str]:
        files = [] if order.options.restart else finished_files(path)
        if files and (why := difference(files, order.identity)):
            say(f"{files[0]}: {why}; it is made again")
            return []
        return [file.name for file in files]

    if names := ranks.agree(look):
        say(f"using {path.with_name(names[0])} from an earlier run")
    return [path.with_name(name) for name in names]


def reference_pass(order: Order) -> ReferencePass:
    """The evaluation's half that can run while the original is being read anyway."""
    source, text = source_of(order.checkpoint, order.device), order.options.evaluation
    return ReferencePass(source, cut(text.corpus("evaluation"), source, text), order.folder / REFERENCE)


def make_file(order: Order, out: Path, reference: ReferencePass | None) -> list[Path]:
    """One pass over the layers, unless an imatrix is there already or takes more than one."""
    # That of a pass which was stopped behind its last layer is not yet one to begin with.
    there = ranks.agree(lambda: ONE_PASS not in begun(out) and is_ours(order, order.imatrix))
    repeated = there or order.options.calibration.expert_tokens
    if order.options.imatrix or (order.encoder == "ggml" and repeated):
        return made(order, out, make_in_two_steps(order, out, reference))
    order = with_gradients(order)
    files = made(order, out, make_in_one_pass(order, out, reference))
    if ranks.index() == 0:
        shutil.rmtree(order.folder / GRADIENTS, ignore_errors=True)
    return files


def is_ours(order: Order, path: Path) -> bool:
    """Whether a file is there that this job made on its way. Says so if it is another's, or was changed."""
    if path.exists() and (why := difference([path], order.identity)):
        say(f"{path}: {why}; it is made again")
        return False
    return path.exists()


def made(order: Order, out: Path, files: list[Path]) -> list[Path]:
    """The files, on record as this job's."""
    ranks.agree(lambda: record(out, files, order.identity))
    return files


def planned_by_damage(order: Order, model: ModelRef | Path | str) -> Order:
    """The order with types chosen by what they cost this model in our encoder, if it is to be so; SENSITIVITY is kept,
    for a rerun chooses by it too."""
    if not order.estimates:
        return order
    order = with_gradients(order)
    options, path = order.options, order.folder / SENSITIVITY
    if not ranks.agree(lambda: is_ours(order, path)):
        assert options.gradients is not None
        how = SensitivityOptions(options.calibration.text, memory=options.calibration.memory)
        found = estimate_damage(source_of(order.checkpoint, order.device), options.gradients, how)
        ranks.agree(lambda: write_text(path, found.to_json()))
        ranks.agree(lambda: note(path, order.identity))
    budget = replace(options.budget, measured=path)
    plan = plan_model(model, options.recipe, options.target, budget, options.split_max_bytes, options.mtp)
    ranks.agree(lambda: write_text(order.folder / PLAN, plan.to_json()))
    ranks.agree(lambda: note(order.folder / PLAN, order.identity))
    return replace(order, plan=plan)


def with_gradients(order: Order) -> Order:
    """The order with gradients to encode by, if its effort is `best`: given, or of a backward pass, run here."""
    options, how = order.options, order.options.calibration
    if order.encoder != "quantkit" or options.effort != "best" or options.gradients:
        return order
    folder, text = order.folder / GRADIENTS, replace(how.text, n_tokens=min(how.text.n_tokens or TOKENS, TOKENS))
    source = source_of(order.checkpoint, order.device)
    say(f"{text.n_tokens:,} tokens forward and backward, to know what matrices' outputs matter")
    if (hours := sum(t.n_weights for t in order.plan.tensors) / ON_GPU["best"] / 3600) > 1:
        say(f"warning: then about {hours:.0f} hours of two-sided encoding on a fast GPU; --effort normal takes minutes")
    calibrate_gradients(source, GradientOptions(text, memory=how.memory, hidden=how.hidden), folder, options.restart)
    return replace(order, options=replace(options, gradients=folder))


def make_in_two_steps(order: Order, out: Path, reference: ReferencePass | None) -> list[Path]:
    """Calibrate (or take an imatrix that is there), then encode with ggml."""
    options, imatrix = order.options, order.options.imatrix or order.imatrix
    if options.imatrix is None:
        if ranks.agree(lambda: is_ours(order, imatrix)):
            say(f"using {imatrix} from an earlier run")
        else:
            calibrate(source_of(order.checkpoint, order.device), options.calibration, imatrix, options.restart)
            ranks.agree(lambda: note(imatrix, order.identity))
    how = QuantizeOptions(options.split_max_bytes, options.restart, overwrite=True, keep_ledger=True)
    after_layer = reference.advance if reference else None
    return quantize_model(order.checkpoint, order.plan, imatrix, out, how, after_layer)


@torch.inference_mode()
def make_in_one_pass(order: Order, out: Path, reference: ReferencePass | None) -> list[Path]:
    """Each layer is calibrated and encoded in one visit: with our encoders and ggml for the rest, or all with ggml."""
    options, plan, how = order.options, order.plan, order.options.calibration
    source, text = source_of(order.checkpoint, order.device), how.text.corpus("calibration")
    chunks = cut(text, source, how.text)
    check_length(chunks, how.text, source)
    n_tokens = chunks.tokens.numel()
    compared = reference.tokens.numel() if reference else 0
    encoder = options.effort + order.known_outputs if order.encoder == "quantkit" else "ggml"
    state = state_of(out, job_of(source, chunks.tokens) + encoder)
    n_bytes = file_bytes(order.checkpoint, plan, options.split_max_bytes)
    room = room_of_pass(order, source, (n_tokens, compared), state, n_bytes)
    if options.restart:
        state.remove()
    say(f"calibrating and encoding on {n_tokens:,} tokens of {text.name}")
    seen = (t for t in plan.tensors if t.layer is not None and (t.rule is not None or t.role == KEPT_ROLE))
    n_entries = sum(len(tensor.shape) > 1 for tensor in seen)
    extra = imatrix_metadata(n_entries, len(chunks.tokens), text.name)
    output = Output(out, fingerprint(order, state), extra, options.split_max_bytes, options.restart, True, True)
    ours = EncoderOptions(options.effort, gradients=options.gradients) if order.encoder == "quantkit" else None
    with open_writer(source.checkpoint, plan, output) as writer:
        if ours and not passed_whole(plan, writer, state.layers()):
            say("layers that the pass has behind it are not whole in the file: the pass begins anew")
            state.remove()
        file_encoder = FileEncoder(source, plan, writer, LayerOptions(ours, how.min_expert_tokens))
        with track("layers", Steps.total(source), "B") as advance, file_encoder as layers:
            steps = Steps(advance, source, n_tokens)
            measured = collect(
                source,
                chunks.tokens,
                state,
                room=room,
                turns=layers.turns,
                watch=steps.watching(layers.watch),
                progress=beside(reference, steps),
            )
        if used := layers.used_by_all():
            say("matrices encoded with " + ", ".join(f"{kind} moments: {count:,}" for kind, count in used.items()))
        coverage.report(measured, n_tokens, how.min_expert_tokens)
        measured = coverage.shrink(measured, how.min_expert_tokens)
        if ranks.index() == 0:
            save_imatrix(
                order.imatrix, measured, datasets=[text.name], chunk_count=len(chunks.tokens), chunk_size=how.text.chunk
            )
            note(order.imatrix, order.identity)
        encode_pending(source.checkpoint, plan, fit_importance(plan, measured), writer, GgmlEncoder())
    state.remove()
    return writer.files


def passed_whole(plan: Plan, writer: GGUFWriter, layers: int) -> bool:
    """Whether all of the first layers is written, as rank 0 sees it. What a damaged disk lost of them our encoders can
    make again only from their moments; ggml would, and worse."""
    passed = [tensor for tensor in plan.tensors if tensor.layer is not None and tensor.layer < layers]
    return ranks.agree(lambda: all(writer.done(t.name, 0, prod(t.shape[:-1])) for t in passed))


def fingerprint(order: Order, state: PassState) -> dict[str, str]:
    """What the bytes of one pass depend on: an interrupted file of another is not gone on with."""
    return {
        "checkpoint": order.checkpoint.fingerprint(),
        "plan": order.plan.digest(),
        ONE_PASS: state.job,
        "encoder": f"{order.encoder} {order.options.effort}" + order.known_outputs,
        "min_expert_tokens": str(order.options.calibration.min_expert_tokens),
    }


def beside(reference: ReferencePass | None, steps: Steps) -> Callable[[int], None]:
    """What to do after so many layers: the reference's pass goes through them too."""

    def progress(done: int) -> None:
        if reference:
            reference.advance(done)
        steps(done)

    return progress


def clear_left(order: Order) -> None:
    """What a run left that was stopped just before its end."""
    state_of(order.out).remove()
    if ranks.index() == 0:
        forget(order.out)
        shutil.rmtree(order.folder / GRADIENTS, ignore_errors=True)
    if order.options.recover and ranks.index() == 0:
        for left in (order.folder / BASE, *order.folder.glob(f"*{STATE}")):
            shutil.rmtree(left, ignore_errors=True)


def make_and_recover(order: Order, reference: ReferencePass | None) -> list[Path]:
    """Make the file in a folder of its own, then its recovered twin on the same calibration text."""
    how = order.options.calibration
    options = RecoverOptions(memory=how.memory, hidden=how.hidden)
    source, options = open_original(order.checkpoint, order.plan, order.device, how.text, order.folder, options)
    base = order.folder / BASE / order.out.name
    base.parent.mkdir(exist_ok=True)
    if files := earlier(order, base):
        ranks.agree(lambda: check_notes(order.folder, order.identity))
    else:
        files = make_file(order, base, reference)
    chunks = cut(how.text.corpus("calibration"), source, how.text)
    job = hashlib.sha256(
        repr((job_of(source, chunks.tokens), GGUFFile.open(files[0]).fingerprint())).encode()
    ).hexdigest()

    def done(recovered: list[Path], gained: Mapping[str, Any]) -> None:
        write_json(order.folder / RECOVERY, gained)
        note(order.folder / RECOVERY, order.identity)
        record(order.out, recovered, order.identity)

    files, _ = recover(files[0], order.folder, source, chunks, job, options, done)
    if ranks.index() == 0:
        shutil.rmtree(base.parent)
    return files
