"""The ctypes binding."""

import gc

import numpy as np
import pytest

from quantkit.errors import QuantkitError
from quantkit.ggml.graph import Graph
from quantkit.ggml.library import LOG, Library, library
from quantkit.ggml.quants import quantize


def test_what_ggml_logs_to_outlives_a_library():
    """Threads that load ggml at once make several libraries and keep one; ggml calls the log of whichever was last."""
    Library(library().folder)
    gc.collect()
    calls: list[tuple] = []
    others = [LOG(lambda *what: calls.append(what)) for _ in range(100)]  # take the place of what was freed
    data = quantize("Q4_K", np.random.default_rng(3).standard_normal((64, 512), np.float32), np.ones(512, np.float32))
    Graph(1).weights("Q4_K", data, 512, 64, repack=True)  # ggml logs this
    assert others and not calls


def test_missing_library_is_named(tmp_path):
    with pytest.raises(QuantkitError, match=r"libggml-base\.so"):
        Library(tmp_path)
