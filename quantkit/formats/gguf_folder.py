"""A folder that stands for the model in it. Light: the command line asks before torch is loaded."""

import re
from pathlib import Path

from quantkit.errors import QuantkitError

IMATRIX = "imatrix.gguf"  # as `make` calls it
LATER = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # splits but the first


def model_in(folder: Path) -> Path:
    """The GGUF of a folder, other than an imatrix: its file, or the first of its splits. QuantkitError for a folder of
    none or of several."""
    found = [path for path in sorted(folder.glob("*.gguf")) if path.name != IMATRIX]
    models = [path for path in found if not LATER.search(path.name)]
    if len(models) == 1:
        return models[0]
    if not models:
        hint = f"; `quantkit status {folder}` says how far it is" if any(folder.glob("**/*.gguf.part*")) else ""
        raise QuantkitError(f"{folder}: no finished GGUF file in this folder{hint}")
    names = ", ".join(path.name for path in models[:4])
    raise QuantkitError(f"{folder}: {len(models)} models ({names}{' ...' if len(models) > 4 else ''}); name one")
