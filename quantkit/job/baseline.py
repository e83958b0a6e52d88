"""`make --baseline`: the same types, encoded by ggml with the importance that was measured, judged on the same text,
and removed: what quantkit's encoder is worth in these bytes. baseline.json keeps the scores."""

import shutil
from typing import Any

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.evaluation.reference import ReferencePass
from quantkit.formats.byte_source import read_whole
from quantkit.job.finished import scored_before, write_scores
from quantkit.job.folder import BASELINE, BASELINE_FILES, PLAN
from quantkit.job.options import MakeOptions, Order
from quantkit.job.stages import QuantizeOptions, VerifyOptions, quantize_model, verify_file
from quantkit.planning.plan import Plan

BY_GGML = "the baseline: the same types by ggml, judged alike, then removed"


def check(options: MakeOptions, encoder: str) -> None:
    """QuantkitError where there is nothing to compare, or nothing to compare by."""
    if not options.baseline:
        return
    if encoder == "ggml" and not options.recover:
        raise QuantkitError("--baseline compares with ggml's encoder, which this run takes itself: leave it out")
    if not options.verify:
        raise QuantkitError("--baseline compares scores: leave out --no-verify")


def measure(order: Order, device: str, passed: ReferencePass | None) -> dict[str, Any]:
    """Scores of the baseline, as verify.json has the file's; measured once, and kept. Resumes. passed: the original's
    half of the evaluation, if it has run. Of rank 0, when all is done that ranks do together."""
    assert ranks.index() == 0
    evaluation = order.options.evaluation
    if (known := scored_before(order.folder, evaluation, BASELINE)) is not None:
        return known
    plan = Plan.from_json(read_whole(order.folder / PLAN, "plan"), str(order.folder / PLAN))
    folder = order.folder / BASELINE_FILES
    folder.mkdir(exist_ok=True)
    how = QuantizeOptions(restart=order.options.restart, overwrite=True)
    files = quantize_model(order.checkpoint, plan, order.imatrix, folder / order.out.name, how, why=BY_GGML)
    scores = verify_file(files[0], order.checkpoint, device, VerifyOptions(evaluation, plan.target), passed=passed)
    write_scores(order.folder, scores, evaluation, BASELINE)
    shutil.rmtree(folder)
    return scores
