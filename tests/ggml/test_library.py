"""Which ggml is loaded, and where it would end the process."""

import pytest

from quantkit.errors import QuantkitError
from quantkit.ggml import library as ggml


def test_a_processor_without_what_the_build_uses_is_told(monkeypatch):
    loaded = ggml.library()
    if not loaded.ggml_cpu_has_avx2():
        pytest.skip("this build of ggml runs everywhere")
    flags = ggml.processor_flags()
    assert {"avx2", "fma"} <= flags
    monkeypatch.setattr(ggml, "processor_flags", lambda: flags - {"avx2", "fma"})
    with pytest.raises(QuantkitError, match=r"is built for avx2 fma, which this processor lacks: .*QUANTKIT_GGML_LIB"):
        ggml.Library(loaded.folder)
