"""Where hidden states live: the first place with room, and a refusal that says what would fit."""

import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.memory import Memory, choose_place
from quantkit.runtime.room import Room

NEED = Memory(fixed=1000, beside=1, per_token=10)


def place(n_tokens, wanted=None, limit=10_000, ram=100_000, on_gpu=True):
    return choose_place(NEED, n_tokens, wanted, limit, "free GPU memory", ram, on_gpu)


def test_the_first_place_that_has_room():
    assert place(100) == "device"
    assert place(2_000) == "ram"
    assert place(8_000) == "disk"
    assert place(2_000, on_gpu=False) == "disk"
    assert place(100, "disk") == "disk"


def test_a_refusal_says_what_fits():
    with pytest.raises(QuantkitError, match="at most 9,000 tokens fit"):
        place(20_000)
    with pytest.raises(QuantkitError, match=r"at most 818 tokens fit$"):
        place(1_000, "device")
    with pytest.raises(QuantkitError, match="no tokens fit"):
        place(1, limit=900)


def test_arrays_on_disk_are_arrays(tmp_path):
    room = Room("disk", folder=tmp_path)
    a, b = room.empty((3, 4), torch.bfloat16), room.empty((2,), torch.float32)
    a.copy_(torch.arange(12).view(3, 4))
    b.fill_(7)
    assert a.sum() == 66 and b.tolist() == [7, 7]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) == 12 * 2 + 2 * 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_beside_a_gpu_the_same_hidden_states_come_out(tiny, tmp_path, kind):
    from quantkit.runtime.sources.checkpoint import CheckpointSource
    from quantkit.runtime.stream import stream

    source = CheckpointSource(tiny, "cuda", torch.float32)
    tokens = torch.randint(10, 760, (4, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        here = [step.compute().clone() for step in stream(source, tokens)][-1]
        there = [step.compute().clone() for step in stream(source, tokens, room=Room(kind, "cuda", tmp_path))][-1]
    assert there.device.type == "cpu"
    torch.testing.assert_close(there, here.cpu(), rtol=1e-4, atol=1e-4)
