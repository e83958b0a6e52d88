"""States carry the checksum of their bytes: any change is noticed, and other tools still read them."""

import pytest
import torch
from safetensors.torch import load_file

from quantkit.errors import QuantkitError
from quantkit.formats import sealed

TENSORS = {
    "a": torch.arange(3000, dtype=torch.float32).view(30, 100),
    "b": torch.arange(5),
    "c": torch.ones(7).bfloat16(),
}


def test_any_tool_reads_what_was_written(tmp_path):
    path = tmp_path / "state"
    sealed.write(path, TENSORS, {"job": "j", "a": "first"})
    sealed._known.clear()
    assert sealed.about(path) | {"crc32": ""} == {"crc32": "", "job": "j", "a": "first"}
    assert all(torch.equal(load_file(path)[name], tensor) for name, tensor in TENSORS.items())
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_pieces_in_any_order_make_the_same_file(tmp_path):
    sealed.write(tmp_path / "whole", TENSORS)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    with sealed.writing(tmp_path / "pieces", shapes) as file:
        file.write("c", TENSORS["c"])
        file.write("a", TENSORS["a"][20:], 20)
        file.write("b", TENSORS["b"])
        file.write("a", TENSORS["a"][:20])
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "pieces").read_bytes()


@pytest.mark.parametrize("at", [0, 3, 12, 40, 300, 5000, -1])
def test_every_changed_byte_is_noticed(tmp_path, at):
    path = tmp_path / "state"
    sealed.write(path, TENSORS, {"job": "j"})
    data = bytearray(path.read_bytes())
    data[at] ^= 0x21
    path.write_bytes(data)
    with pytest.raises(sealed.Damaged, match="state: damaged"), sealed.reading(path):
        pass
    assert "damaged" in sealed.whole(path)


def test_a_file_without_a_checksum_or_cut_short_is_damaged(tmp_path):
    path = tmp_path / "state"
    sealed.write(path, TENSORS)
    data = path.read_bytes()
    for left in (b"", data[:10], data[:-1], data + b"\0", b"\0" * len(data)):
        path.write_bytes(left)
        assert "damaged" in sealed.whole(path)
    with pytest.raises(QuantkitError, match="no such file"), sealed.reading(tmp_path / "none"):
        pass
