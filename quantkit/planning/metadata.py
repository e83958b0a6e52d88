"""The metadata of a planned file: they follow from the model's folder and the plan, and so does the header's length."""

from collections import Counter
from pathlib import Path
from typing import Any

import gguf

from quantkit import __version__
from quantkit.formats.gguf_values import U32
from quantkit.formats.tensor_table import model_name
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.tokenizer_metadata import tokenizer_metadata
from quantkit.planning.plan import Plan


def file_metadata(folder: Path, config: ModelConfig, plan: Plan) -> dict[str, Any]:
    """All metadata but the provenance of a run: the same model folder and plan always give the same header."""
    types = Counter[str]()
    for tensor in plan.tensors:
        types[tensor.qtype] += tensor.n_weights
    general = {
        "general.quantization_version": U32(2),
        "general.file_type": U32(_file_type(types.most_common(1)[0][0])),
        "general.quantized_by": f"quantkit {__version__}",
        "quantkit.recipe": plan.recipe,
        "quantkit.target": plan.target,
    }
    known = family.of(config)
    words = tokenizer_metadata(folder, config.n_vocab, known.PRE, known.CHAT_TEMPLATE)
    return family.metadata(config, plan.mla, plan.model or model_name(folder)) | general | words


def _file_type(qtype: str) -> int:
    """llama.cpp's label for the file: the type that holds most weights (informative only)."""
    named = {kind.name: int(kind) for kind in gguf.LlamaFileType}
    for label in (f"MOSTLY_{qtype}", f"MOSTLY_{qtype}_M", f"MOSTLY_{qtype}_S", "ALL_" + qtype):
        if label in named:
            return named[label]
    return int(gguf.LlamaFileType.GUESSED)
