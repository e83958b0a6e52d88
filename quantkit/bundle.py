"""Where bundled recipes, models and texts lie: inside an installed package, or at the top of the repository."""

from pathlib import Path

HERE = Path(__file__).parent


def recipes_dir() -> Path:
    """The folder of `NAME.toml`."""
    return _folder("recipes")


def models_dir() -> Path:
    """The folder of model folders."""
    return _folder("models")


def texts_dir() -> Path:
    """The folder of the default text, an archive as its author published it."""
    return _folder("texts")


def recipe_names() -> list[str]:
    """Names that `--recipe` takes, sorted."""
    return sorted(path.name.removesuffix(".toml") for path in recipes_dir().glob("*.toml"))


def model_names() -> list[str]:
    """Bundled models by the names of their folders, sorted."""
    return sorted(path.parent.name for path in models_dir().glob("*/config.json"))


def no_model(name: str) -> str:
    """What is said of a name that is no model."""
    names = ", ".join(model_names())
    return f"{name}: no such folder, not one of the bundled models ({names}), and not a Hub id (user/name)"


def _folder(kind: str) -> Path:
    installed = HERE / "bundled" / kind
    return installed if installed.is_dir() else HERE.parent / kind
