"""The stages of `make` that read weights, each by itself."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, streams
from quantkit.cli.options import Shared
from quantkit.cli.values import (
    FOLDER,
    IMATRIX,
    IMATRIX_OR_GRADIENTS,
    OUT,
    OUT_FOLDER,
    PLAN,
    TOKENS,
    WEIGHTS,
    OneOf,
)
from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.calibration.options import Calibration
    from quantkit.job.stages import QuantizeOptions, SensitivityOptions
    from quantkit.planning.plan import Plan


@dataclass(frozen=True)
class Besides:
    """What `calibrate` leaves besides the imatrix: a folder of gradients, of so many tokens; one of second moments."""

    gradients: Path | None
    gradient_tokens: int
    moments: Path | None


def _check_calibrate(output: Path, gradients: Path | None, restart: bool) -> None:
    """QuantkitError for a name that is taken."""
    from quantkit.job.asked import check_new_imatrix

    check_new_imatrix(output, gradients, restart)


@click.command()
@options.checked(_check_calibrate)
@click.argument("model", type=WEIGHTS, default="tiny-r1")
@click.option("--output", "-o", type=OUT, default="imatrix.gguf", show_default=True)
@options.calibration
@Shared(
    (
        click.option(
            "--gradients",
            type=OUT_FOLDER,
            default=None,
            help="Also derive the model's loss, layer by layer back, and write gradients-NNN.safetensors here.",
        ),
        click.option(
            "--gradient-tokens",
            default=16384,
            show_default=True,
            type=TOKENS,
            help="Most tokens of calibration text for that.",
        ),
        click.option(
            "--moments",
            type=OUT_FOLDER,
            default=None,
            help="Also keep second moments of all inputs here, for `quantize --moments`: says first how many GB.",
        ),
    ),
    "besides",
    Besides,
)
@options.device
@options.restart
def calibrate(
    model: str,
    output: Path,
    calibration: "Calibration",
    besides: Besides,
    device: str | None,
    restart: bool,
) -> None:
    """Measure importance: run text through the model, layer by layer, and write an imatrix. Resumes.

    MODEL (default: tiny-r1) is a checkpoint folder, a bundled name, a Hub id or a GGUF file.
    """
    from quantkit.calibration import measure
    from quantkit.calibration.gradients import GradientOptions, calibrate_gradients
    from quantkit.calibration.options import sized
    from quantkit.encoding.saved import Keeper, check_kept
    from quantkit.formats.lock import locked
    from quantkit.job.by_moments import tie
    from quantkit.job.forecast import forecast_calibration
    from quantkit.job.stages import source_of
    from quantkit.machine import chosen_device
    from quantkit.models.open import open_weights
    from quantkit.progress import say
    from quantkit.runtime.layers import only_forward

    source = source_of(open_weights(model), chosen_device(device))
    if besides.moments:
        check_kept(source.config, besides.moments)
    if besides.gradients:
        only_forward(source.config, "--gradients")
    text = sized(calibration.text, source.config, source.device, calibration.memory)
    calibration = dataclasses.replace(calibration, text=text)
    for line in forecast_calibration(source, text.n_tokens or 0, output, besides.moments):
        say(line)
    gradients, moments = besides.gradients, besides.moments
    with locked(output.parent), locked(gradients or output.parent), locked(moments or output.parent):
        if gradients:  # first: what is finished of them is not done again, so a rerun goes on in either pass
            text = dataclasses.replace(calibration.text, n_tokens=besides.gradient_tokens)
            calibrate_gradients(source, GradientOptions(text, memory=calibration.memory), gradients, restart)
        measure.calibrate(source, calibration, output, restart, partial(Keeper, moments) if moments else None)
        if moments:
            tie(moments, output)
    streams.show(str(output))


def _check_types(types: str | None, other_types: str | None) -> None:
    """QuantkitError for a type that is none."""
    for option, given in (("--types", types), ("--other-types", other_types)):
        for name in given.split(",") if given else ():
            if name not in qtypes.QTYPES:
                raise QuantkitError(f"{option} {name}: unknown; choose {', '.join(qtypes.QTYPES)}")


def _sensitivity_options(types: str | None, other_types: str | None, **rest: Any) -> "SensitivityOptions":
    from quantkit.calibration.variants import DEFAULT, Candidates
    from quantkit.job.stages import SensitivityOptions

    routed = tuple(types.split(",")) if types else DEFAULT.routed
    others = tuple(other_types.split(",")) if other_types else DEFAULT.others
    return SensitivityOptions(types=Candidates(routed, others) if types or other_types else None, **rest)


@click.command()
@options.checked(_check_types)
@click.argument("model", type=WEIGHTS, default="tiny-r1")
@click.option(
    "--imatrix",
    "--gradients",
    "basis",
    type=IMATRIX_OR_GRADIENTS,
    required=True,
    help="An imatrix, to measure types as ggml encodes them; or a folder of `calibrate --gradients`, to estimate them "
    "for quantkit's encoder.",
)
@click.option(
    "--output",
    "-o",
    type=OUT_FOLDER,
    default=Path("."),
    help="Folder for sensitivity.json and sensitivity.png.",
)
@Shared(
    (
        options.text(None, "measurement", "8192, with gradients as in `calibrate`"),
        click.option(
            "--budget",
            default=1 << 21,
            show_default=True,
            type=click.IntRange(1),
            help="Stream-tokens: tokens x forks carried through the layers. Too few for all forks: a cheaper "
            "estimate, by layer.",
        ),
        click.option(
            "--types",
            default=None,
            metavar="A,B",
            help="Types to try on routed experts. Default: five; all with --gradients.",
        ),
        click.option(
            "--other-types",
            default=None,
            metavar="A,B",
            help="Types to try on all other tensors. Default: four, or all.",
        ),
    ),
    "how",
    _sensitivity_options,
)
@options.device
def sensitivity(model: str, basis: Path, output: Path, how: "SensitivityOptions", device: str | None) -> None:
    """What each tensor's type costs: KL divergence at the output if only that tensor is quantized, in one pass.

    MODEL's default is tiny-r1. `plan --sensitivity` goes by what is found."""
    from quantkit.job import stages
    from quantkit.job.folder import SENSITIVITY
    from quantkit.machine import chosen_device
    from quantkit.models.open import open_weights

    device = chosen_device(device)
    source = stages.source_of(open_weights(model), device)
    stages.measure_sensitivity(source, basis, output, how)
    streams.show(str(output / SENSITIVITY))


def _quantize_options(split_max_bytes: int, **rest: Any) -> "QuantizeOptions":
    """rest: fields of QuantizeOptions, by their names."""
    from quantkit.job.stages import QuantizeOptions

    return QuantizeOptions(split_max_bytes=split_max_bytes or None, **rest)


def _check_quantize(encoder: str, moments: Path | None, output: Path, overwrite: bool, restart: bool) -> None:
    """QuantkitError for an encoder without what it needs, and for a name that is taken."""
    from quantkit.job.asked import check_moments, check_new_model

    check_moments(encoder, moments)
    check_new_model(output, overwrite, restart)


@click.command()
@options.checked(_check_quantize)
@click.argument("model", type=WEIGHTS)
@click.option("--plan", "chosen", type=PLAN, required=True, help="plan.json of `quantkit plan`.")
@click.option("--imatrix", type=IMATRIX, required=True)
@click.option("--output", "-o", type=OUT, required=True)
@Shared(
    (
        click.option(
            "--moments",
            type=FOLDER,
            default=None,
            help="Folder of `calibrate --moments`, for quantkit's encoder: about half the KLD in the same bytes.",
        ),
        click.option(
            "--encoder",
            type=OneOf(["auto", "quantkit", "ggml"]),
            default="auto",
            show_default=True,
            help="auto: quantkit if --moments are given, else ggml, as llama-quantize.",
        ),
        options.effort,
        options.device,
        options.split,
        options.restart,
        click.option("--overwrite", is_flag=True, help="Replace a finished file of that name."),
    ),
    "how",
    _quantize_options,
)
@options.threads
def quantize(model: str, chosen: "Plan", imatrix: Path, output: Path, how: "QuantizeOptions") -> None:
    """Encode every tensor as planned and write the GGUF file(s): with ggml, or by --moments with quantkit's encoder, as
    `make`. Resumes where an earlier run stopped."""
    from quantkit.job.by_moments import check_quantize, quantize_file
    from quantkit.job.forecast import forecast_quantize
    from quantkit.models.open import open_weights
    from quantkit.progress import say

    checkpoint = open_weights(model)
    for line in forecast_quantize(check_quantize(checkpoint, chosen, imatrix, how), chosen, output, how):
        say(line)
    files = quantize_file(checkpoint, chosen, imatrix, output, how)
    streams.show("\n".join(map(str, files)))
