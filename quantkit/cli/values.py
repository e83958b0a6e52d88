"""What values of options may be: each kind refuses, in one line and before anything heavy is loaded, what it is not."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
from click.shell_completion import CompletionItem

from quantkit import bundle, sizes
from quantkit.errors import QuantkitError
from quantkit.formats import model_names
from quantkit.formats.gguf_folder import model_in
from quantkit.runtime.bounds import BOUNDS, check


class Place(click.Path):
    """A path in which ~ is the home folder: shells leave it alone in --output=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click.Path."""
        return super().convert(os.path.expanduser(value), param, ctx)


class TextFile(Place):
    """A file of text, or - for what comes on stdin."""

    name = "file"

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=True, path_type=Path)


class ModelFile(Place):
    """A GGUF, or a folder that holds one model: its file, or the first of its splits."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """QuantkitError for a folder of none or of several, and for a file that is no GGUF."""
        path = Path(super().convert(value, param, ctx))
        found = model_in(path) if path.is_dir() else path
        model_names.check_gguf(found)
        return found


class ImatrixFile(Place):
    """An imatrix. folders: a folder of gradients may stand in its place."""

    def __init__(self, folders: bool = False) -> None:
        super().__init__(exists=True, dir_okay=folders, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """QuantkitError for a file that is no GGUF, and for a folder without gradients."""
        path = Path(super().convert(value, param, ctx))
        if path.is_file():
            model_names.check_imatrix(path)
        elif not any(path.glob("gradients-*.safetensors")):
            raise QuantkitError(f"{path} holds no gradients (gradients-000.safetensors and so on)")
        return path


class PlanFile(Place):
    """A plan.json, read."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Plan. QuantkitError for a file that is none."""
        from quantkit.formats.byte_source import read_whole
        from quantkit.planning.plan import Plan

        path = Path(super().convert(value, param, ctx))
        return Plan.from_json(read_whole(path, "plan"), str(path))


MODEL_FILE = ModelFile(exists=True, path_type=Path)
TEXT_FILE = TextFile()
IMATRIX, IMATRIX_OR_GRADIENTS = ImatrixFile(), ImatrixFile(folders=True)
PLAN = PlanFile(exists=True, dir_okay=False, path_type=Path)
FILE = Place(exists=True, dir_okay=False, path_type=Path)
FOLDER = Place(exists=True, file_okay=False, path_type=Path)
OUT = Place(dir_okay=False, path_type=Path)
OUT_FOLDER = Place(file_okay=False, path_type=Path)
LONGEST_CONTEXT = 10**8


class ModelName(click.ParamType):
    """A folder, a file, a bundled name, or what may be a model on a Hub; whether it is one, `open_model` finds.
    weights: a description without them will not do."""

    name = "model"

    def __init__(self, weights: bool = False) -> None:
        self.weights = weights

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """QuantkitError for what is none of these."""
        name = os.path.expanduser(str(value))
        model_names.check_model(name)
        if self.weights and (folder := model_names.folder_of(name)) and model_names.is_description(folder):
            raise QuantkitError(model_names.no_weights(value))
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Bundled names; else files and folders."""
        names = [name for name in bundle.model_names() if name.startswith(incomplete)]
        return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


class Size(click.ParamType):
    """Bytes: GB is 10^9 and GiB is 2^30, in every option."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """QuantkitError, naming the option, for what is not a size."""
        return value if isinstance(value, int) else sizes.parse_size(value, name_of(param))


@dataclass(frozen=True)
class FileSize:
    """How large the whole file may be: in bytes, or in bits of tensor data per weight."""

    size: int | None = None
    bpw: float | None = None


class SizeOrBits(click.ParamType):
    """131GB, or 1.8bpw: bits of tensor data per weight of the whole model."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> FileSize:
        """QuantkitError, naming the option, for what is neither."""
        if isinstance(value, FileSize):
            return value
        number = value.strip().lower()
        if not number.endswith("bpw"):
            return FileSize(size=sizes.parse_size(value, name_of(param)))
        try:
            bits = float(number.removesuffix("bpw"))
        except ValueError:
            bits = 0.0
        if not 0 < bits <= 32:
            raise QuantkitError(f"{name_of(param)} {value}: bits per weight are a number up to 32, like 1.8bpw")
        return FileSize(bpw=bits)


class Tokens(click.ParamType):
    """16k or 16384 -> tokens (k is 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """QuantkitError, naming the option, for what is no number of tokens."""
        if isinstance(value, int):
            return value
        number = value.lower().removesuffix("k")
        if not number.isdecimal() or not 0 < int(number[:9]) < LONGEST_CONTEXT or len(number) > 9:
            raise QuantkitError(f"{name_of(param)} {value}: not a number of tokens; write 16384 or 16k")
        return int(number) * (1024 if number != value.lower() else 1)


class GpuLayers(click.ParamType):
    """auto, a number of layers, or a share of all experts."""

    name = "auto|n|n%"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | Literal["auto"]:
        """QuantkitError, naming the option, for anything else."""
        if not isinstance(value, str):
            return value
        if value == "auto":
            return "auto"
        number = value.removesuffix("%")
        if not number.isdecimal() or len(number) > 4 or (number != value and int(number) > 100):
            raise QuantkitError(
                f"{name_of(param)} {value}: write auto or a number of layers, or how much of all experts, like 40%"
            )
        return int(number) if number == value else int(number) / 100


class Sampled(click.FloatRange):
    """A number that says how tokens are drawn, by its name in `bounds.BOUNDS`."""

    def __init__(self, name: str) -> None:
        super().__init__(*BOUNDS[name])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """QuantkitError, naming the option, for what is none or beyond the bounds."""
        assert self.min is not None and self.max is not None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        check(number, (self.min, self.max), f"{name_of(param)} {value}")
        return number


class OneOf(click.Choice[str]):
    """One of a few words; another is refused as everything else is, in one line."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """QuantkitError, naming the option and the words."""
        if value not in self.choices:
            raise QuantkitError(f"{name_of(param)} {value}: unknown; choose {', '.join(self.choices)}")
        return value


def name_of(param: click.Parameter | None) -> str:
    """`--size`, for messages."""
    return max(param.opts, key=len) if param else ""


SIZE, TOKENS, MODEL, WEIGHTS = Size(), Tokens(), ModelName(), ModelName(weights=True)
SEED = click.IntRange(-(2**63), 2**63 - 1)  # what torch's generators take
