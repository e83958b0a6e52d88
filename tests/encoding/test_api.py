"""Which back end encodes: chosen once, by the device and by what is installed."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from encoder_data import data

from quantkit.encoding import api
from quantkit.encoding.backends.reference import Backend


class Counting(Backend):
    """The plain one, which counts the superblocks that it is given."""

    superblocks = 0

    def superblock(self, *args):
        self.superblocks += 1
        super().superblock(*args)


def test_every_loop_is_that_of_the_back_end_that_was_asked_for():
    w, hessian = data(rows=3)
    backend = Counting()
    packed = api.encode("Q4_K", w, hessian, backend=backend, device="cpu")
    assert backend.superblocks == 2
    assert np.array_equal(packed, api.encode("Q4_K", w, hessian, backend=Backend(), device="cpu"))


def test_numba_where_it_is_installed():
    pytest.importorskip("numba")
    assert type(api.choose("cpu")).__name__ == "NumbaBackend" and api.choose("cpu") is api.choose("cpu")


@pytest.mark.parametrize(("device", "module"), [("cpu", "numba_backend"), ("cuda", "triton_backend")])
def test_without_compiled_loops_it_says_so_and_takes_the_plain_ones(device, module, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, f"quantkit.encoding.backends.{module}", None)
    with caplog.at_level(logging.WARNING):
        backend = api.choose.__wrapped__(device)
    assert type(backend) is Backend
    (record,) = caplog.records
    assert device in record.getMessage() and "plain torch" in record.getMessage()


def test_compilers_are_imported_when_they_are_needed():
    code = "import sys, quantkit.encoding.api; print({'numba', 'triton'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_other_devices_take_the_plain_loops(caplog):
    assert type(api.choose(torch.device("meta").type)) is Backend and not caplog.records
