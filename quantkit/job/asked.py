"""What options say by themselves: refused before a model is opened, and before torch is loaded."""

import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text, read_whole
from quantkit.formats.model_names import CONFIG, REPO_ID, folder_of
from quantkit.job.folder import NO_FIGURES, NOT_MADE, PLAN, PROVENANCE, VERIFY
from quantkit.planning import mixtures, published
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Recipe

PICTURES = (".png", ".svg")
NO_JOB = "{}: no job is at work here, and none was stopped: nothing of one lies here"
GEOMETRY = ("num_hidden_layers", "hidden_size", "n_routed_experts")


def check_recipe(name: str) -> None:
    """QuantkitError for a recipe or plan.json that is not there or has errors."""
    if name.endswith(".json"):
        Plan.from_json(read_whole(Path(name), "plan"), name)
    elif Path(name).is_file() or mixtures.known(name) is None:
        Recipe.load(name)


def check_types(model: str, name: str | None, budget: BudgetOptions) -> None:
    """QuantkitError for limits that contradict each other, for an open recipe without a budget, and for a budget where
    the recipe (None: none was named) leaves nothing open. model: whose config.json says whether there are published
    tables by which a recipe by size can be filled anew."""
    budget.check()
    if name is None:
        return
    if name.endswith(".json"):
        if budget.given:
            raise QuantkitError(f"{name}: a plan fixes every type, so a budget has nothing to choose; give a recipe")
        return
    preset = not Path(name).is_file() and mixtures.known(name)
    recipe = None if preset else Recipe.load(name)
    if recipe and recipe.is_open:
        if not budget.given and not recipe.budget:
            raise QuantkitError(f"--recipe {name} leaves types to a budget; give one, such as --size 140GB")
    elif budget.given and not (recipe and recipe.published and _may_be_published(model)):
        raise QuantkitError(
            f"--recipe {name}: its rules fix every type, so a budget has nothing to choose; leave one of the two out, "
            "or write a recipe that leaves tensors open with allocate"
        )


def _may_be_published(model: str) -> bool:
    """Whether a model can be one of published.toml, as far as its name and config.json say."""
    folder = folder_of(model)
    if folder is None:
        return True
    try:
        config: Any = json.loads(read_text(folder / CONFIG, "config"))
    except (ValueError, RecursionError):
        return True
    config = config.get("text_config", config) if isinstance(config, dict) else {}
    told = tuple(config.get(key) for key in GEOMETRY) if isinstance(config, Mapping) else (None,)
    return None in told or any(known.geometry == told for known in published.load())


def check_encoder(encoder: str, imatrix: Path | None) -> None:
    """QuantkitError for an encoder that needs more than an imatrix holds."""
    if imatrix and encoder == "quantkit":
        raise QuantkitError("--imatrix holds no second moments: quantkit's encoders need the text (leave it out)")


def check_unused(encoder: str, effort: str, imatrix: Path | None, data: tuple[str, ...]) -> None:
    """QuantkitError for an effort or a text that would be given for nothing."""
    if effort != "normal" and (imatrix or encoder == "ggml"):
        given = "--imatrix means ggml's encoder" if imatrix else "--encoder ggml"
        raise QuantkitError(f"--effort {effort} is of quantkit's encoder, but {given}: leave one of the two out")
    if imatrix and data:
        raise QuantkitError(
            "--imatrix stands in place of calibration, so nothing reads --data: leave one of the two out"
        )


def check_baseline(encoder: str, recover: bool, verify: bool) -> None:
    """Refuse --baseline where there is nothing to compare, or nothing to compare by."""
    if encoder == "ggml" and not recover:
        raise QuantkitError("--baseline compares with ggml's encoder, which this run takes itself: leave it out")
    if not verify:
        raise QuantkitError("--baseline compares scores: leave out --no-verify")


def check_moments(encoder: str, folder: Path | None) -> None:
    """QuantkitError for quantkit's encoder without second moments, and for a folder that holds none."""
    if encoder == "quantkit" and folder is None:
        raise QuantkitError(
            "--encoder quantkit needs second moments: run `quantkit calibrate MODEL --moments DIR`, give --moments "
            "DIR here; or `quantkit make`, which measures and encodes in one visit of each layer"
        )
    if folder and not any(folder.glob("moments-*.safetensors")):
        raise QuantkitError(f"{folder} holds no moments; `quantkit calibrate --moments {folder}` makes them")


def check_new_model(out: Path, overwrite: bool, restart: bool) -> None:
    """QuantkitError if a finished file has the name, unless a run that is to go on was cut off behind it."""
    going_on = not restart and any(out.parent.glob(f"{glob.escape(out.name)}.part.ledger*"))
    if out.exists() and not overwrite and not going_on:
        raise QuantkitError(f"{out} exists already; --overwrite replaces it, or choose another name")


def check_new_imatrix(out: Path, gradients: Path | None, restart: bool) -> None:
    """QuantkitError if an imatrix has the name, unless it is to be measured anew, or a run that is to go on does that.
    gradients: the folder that the run writes as well."""
    states = [*out.parent.glob(f"{glob.escape(out.name)}.state*"), *(gradients.glob("state") if gradients else ())]
    if out.exists() and not restart and not states:
        raise QuantkitError(f"{out} exists already; --restart measures it anew, or choose another name")


def check_new_folder(out: Path | None) -> None:
    """QuantkitError for a folder that is there already. None: its name follows from the file's."""
    if out and out.exists():
        raise QuantkitError(f"{out} exists already; remove it or choose another --output")


def check_evaluation_output(out: Path | None) -> None:
    """QuantkitError for a name that the continuations beside the figures have."""
    if out and out.suffix == ".jsonl":
        raise QuantkitError(
            f"--json {out}: continuations lie in the .jsonl beside the figures; name it {out.stem}.json"
        )


def check_reportable(folders: tuple[Path, ...]) -> None:
    """QuantkitError for a folder without anything that a report could be of."""
    for folder in folders:
        if not (folder / VERIFY).is_file() and not (folder / PLAN).is_file():
            raise QuantkitError(NO_FIGURES.format(folder))


def check_publishable(folder: Path, repo: str) -> None:
    """QuantkitError for a folder without a plan, and for what is no name of a repository."""
    if not (folder / PLAN).exists():
        raise QuantkitError(NOT_MADE.format(folder / PLAN, folder))
    if not REPO_ID.fullmatch(repo) or "@" in repo:
        raise QuantkitError(f"--repo {repo}: write USER/NAME")


def check_job(folder: Path) -> None:
    """QuantkitError for a folder in which nothing of a job lies."""
    if (folder / PLAN).exists() or (folder / PROVENANCE).exists():
        return
    if not any(re.search(r"\.(state|part|gguf)|gradients-", path.name) for path in folder.rglob("*.*")):
        raise QuantkitError(NO_JOB.format(folder))


def check_plan_outputs(outputs: tuple[Path, ...]) -> None:
    """QuantkitError for a name that says neither JSON nor a picture."""
    for output in outputs:
        if str(output) != "-" and output.suffix not in (".json", *PICTURES):
            raise QuantkitError(
                f"-o {output}: name it .json for the plan, .png or .svg for its picture, or - for the plan on stdout"
            )
