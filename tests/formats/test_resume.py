"""Interrupted runs: resumed, killed, changed, damaged, repeated; and what the ledger promises."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from small_gguf import ID, TENSORS, begin, data_of, fill, interrupt, slices, write

from quantkit.errors import QuantkitError
from quantkit.formats import gguf_writer, part_file
from quantkit.formats.ledger import Coverage, Ledger


@pytest.mark.parametrize("split", [None, 2900])
@pytest.mark.parametrize("n_slices", [0, 1, 9, 30])
def test_resume_gives_identical_bytes(tmp_path, n_slices, split):
    expected = [f.read_bytes() for f in write(tmp_path / "whole" / "m.gguf", split_max_bytes=split)]
    path = tmp_path / "m.gguf"
    interrupt(path, n_slices, split_max_bytes=split)
    assert not list(tmp_path.glob("*.gguf"))  # nothing has its final name yet
    with begin(path, split_max_bytes=split) as out:
        for i, (tensor, row) in enumerate(slices()):
            assert out.done(tensor.name, row, row + 1) == (i < n_slices)
            if i >= n_slices:
                out.write(tensor.name, row, data_of(tensor)[row : row + 1])
    assert [file.read_bytes() for file in out.files] == expected
    assert not list(tmp_path.glob("*.part*"))


def test_resume_after_kill(tmp_path):
    """SIGKILL in the middle: what the ledger vouches for is there, and the rest can be written."""
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from quantkit.formats import gguf_writer
        from small_gguf import begin, fill, slices
        gguf_writer.SYNC_BYTES = 1
        with begin(Path({str(tmp_path / "m.gguf")!r})) as out:
            fill(out, slices()[:11])
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with begin(tmp_path / "m.gguf") as out:
        left = [(tensor, row) for tensor, row in slices() if not out.done(tensor.name, row, row + 1)]
        assert len(left) == len(slices()) - 11
        fill(out, left)
    assert out.files[0].read_bytes() == write(tmp_path / "whole.gguf")[0].read_bytes()


def test_pending_slices(tmp_path):
    interrupt(tmp_path / "m.gguf", 8)  # 6 rows of token_embd, the norm, 1 row of ffn_down_exps
    with pytest.raises(QuantkitError, match="not all written"), begin(tmp_path / "m.gguf") as out:
        assert out.pending("token_embd.weight", [(0, 3), (3, 6)]) == []
        assert out.pending("blk.0.ffn_down_exps.weight", [(0, 1), (0, 3), (3, 6)]) == [(0, 3), (3, 6)]


def test_leaving_normally_but_incomplete_is_an_error(tmp_path):
    with pytest.raises(QuantkitError, match=r"'output\.weight' is not all written; run again"):
        write(tmp_path / "m.gguf", slices()[:-1])
    write(tmp_path / "m.gguf", slices()[-1:])  # which resumes


def test_torn_last_ledger_line_is_ignored(tmp_path):
    interrupt(tmp_path / "m.gguf", 9)
    ledger = tmp_path / "m.gguf.part.ledger"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines)[:-4])
    with begin(tmp_path / "m.gguf") as out:
        assert not out.done(slices()[8][0].name, slices()[8][1], slices()[8][1] + 1)
        fill(out, slices()[8:])
    assert len(lines) == 10


@pytest.mark.parametrize("stopped", [9, None])
def test_a_recorded_slice_that_the_disk_lost_is_made_again(tmp_path, capsys, stopped):
    """A page of zeros where a slice was recorded, in parts or, after a kill amid the renames, in a file that has its
    final name already."""
    whole = write(tmp_path / "whole.gguf")[0].read_bytes()
    path = tmp_path / "m.gguf"
    interrupt(path, len(slices()) if stopped is None else stopped)
    part = path.with_name("m.gguf.part")
    if stopped is None:
        part = part.rename(path)
    data = bytearray(part.read_bytes())
    at = max(i for i in range(len(data) // 2) if data[i])
    data[at - 16 : at + 1] = bytes(17)
    part.write_bytes(data)
    with begin(path) as out:
        left = [(tensor, row) for tensor, row in slices() if not out.done(tensor.name, row, row + 1)]
        assert len(left) > (0 if stopped is None else len(slices()) - stopped)
        fill(out, left)
    assert "recorded slices are damaged; they are made again" in capsys.readouterr().err
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"nonsense\n", b'["token_embd.weight", -1, 3]\n', b'["a", 0]\n', b"\xff\n"])
def test_damaged_ledger_is_not_trusted(tmp_path, damage):
    interrupt(tmp_path / "m.gguf", 9)
    with open(tmp_path / "m.gguf.part.ledger", "ab") as ledger:
        ledger.write(damage + b'["token_embd.weight", 0, 1]\n')
    with pytest.raises(QuantkitError, match=r"ledger: damaged"):
        begin(tmp_path / "m.gguf")
    write(tmp_path / "m.gguf", restart=True)


def test_another_fingerprint_is_named(tmp_path):
    interrupt(tmp_path / "m.gguf", 9)
    with pytest.raises(QuantkitError, match="imatrix changed since"):
        begin(tmp_path / "m.gguf", fingerprint={**ID, "imatrix": "i2"})
    with pytest.raises(QuantkitError, match="layout changed since"):
        begin(tmp_path / "m.gguf", split_max_bytes=2900)
    with pytest.raises(QuantkitError, match="checkpoint and recipe changed"):
        begin(tmp_path / "m.gguf", fingerprint={"imatrix": "i1", "plan": "p1", "recipe": "r1"})
    files = write(tmp_path / "m.gguf", fingerprint={**ID, "imatrix": "i2"}, split_max_bytes=2900, restart=True)
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


@pytest.mark.parametrize("damage", ["gone", "short", "other"])
def test_part_that_is_not_the_interrupted_one(tmp_path, damage):
    interrupt(tmp_path / "m.gguf", 9)
    part = tmp_path / "m.gguf.part"
    if damage == "gone":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] if damage == "short" else bytes(part.stat().st_size))
    with pytest.raises(QuantkitError, match=r"m\.gguf\.part: .*restart"):
        begin(tmp_path / "m.gguf")


def test_part_without_ledger_is_begun_again(tmp_path):
    interrupt(tmp_path / "m.gguf", 9)
    (tmp_path / "m.gguf.part.ledger").unlink()
    with begin(tmp_path / "m.gguf") as out:
        assert not any(out.done(tensor.name, row, row + 1) for tensor, row in slices())
        fill(out)


def test_cut_off_while_renaming(tmp_path, monkeypatch):
    renamed = []

    def rename(self: part_file.PartFile) -> None:
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(self.path)
        os.replace(self.path, self.layout.path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(part_file.PartFile, "rename", rename)
        write(tmp_path / "m.gguf", split_max_bytes=1)
    assert len(list(tmp_path.glob("*.gguf"))) == 2 and len(list(tmp_path.glob("*.part"))) == 3
    files = write(tmp_path / "m.gguf", order=[(TENSORS[0], 0)], split_max_bytes=1)
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


def test_finished_file_is_kept_unless_overwritten(tmp_path):
    (old,) = write(tmp_path / "m.gguf")
    for options in ({}, {"restart": True}, {"split_max_bytes": 2900}):
        with pytest.raises(QuantkitError, match=r"m\.gguf exists already"):
            begin(tmp_path / "m.gguf", **options)
    assert os.listdir(tmp_path) == ["m.gguf"]
    interrupt(tmp_path / "m.gguf", 3, split_max_bytes=2900, overwrite=True)
    assert old.exists()  # until the new one is complete
    files = write(tmp_path / "m.gguf", split_max_bytes=2900, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]


def test_two_writers_of_one_model(tmp_path):
    with begin(tmp_path / "m.gguf") as out:
        with pytest.raises(QuantkitError, match="another process is writing"):
            begin(tmp_path / "m.gguf")
        fill(out)


def test_sync_comes_by_bytes_and_time(tmp_path, monkeypatch):
    ledger = tmp_path / "m.gguf.part.ledger"
    with begin(tmp_path / "m.gguf") as out:
        fill(out, slices()[:3])
        assert len(ledger.read_bytes().splitlines()) == 1
        monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1)
        fill(out, slices()[3:4])
        assert len(ledger.read_bytes().splitlines()) == 5
        monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1 << 40)
        monkeypatch.setattr(gguf_writer, "SYNC_SECONDS", 0)
        fill(out, slices()[4:5])
        assert len(ledger.read_bytes().splitlines()) == 6
        fill(out, slices()[5:])


def test_coverage_merges_ranges():
    coverage = Coverage()
    for start, stop in [(4, 6), (0, 2), (8, 9), (2, 4), (5, 7)]:
        coverage.add("t", start, stop)
    assert coverage.covers("t", 0, 7) and coverage.covers("t", 3, 5) and coverage.covers("t", 8, 9)
    assert not coverage.covers("t", 6, 9) and not coverage.covers("t", 7, 8) and not coverage.covers("u", 0, 1)


def test_ledger_without_a_whole_first_line_is_empty(tmp_path):
    (tmp_path / "l").write_bytes(b'{"plan": "p')
    ledger = Ledger(tmp_path / "l")
    assert ledger.load() == (None, [])
    ledger.close(discard_empty=True)
    assert not (tmp_path / "l").exists()


def of_another_rank(path: Path, rank: int, first: int, last: int, **changed: str) -> Path:
    """Move the ledger's lines first:last into the ledger of another rank, as if that one had written the slices."""
    ledger, other = path.with_name(path.name + ".part.ledger"), path.with_name(f"{path.name}.part.ledger.{rank}")
    identity, *lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([identity, *lines[:first], *lines[last:]]) + "\n")
    other.write_text("\n".join([json.dumps(json.loads(identity) | changed), *lines[first:last]]) + "\n")
    return other


def test_what_other_ranks_wrote_counts_however_many_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1)  # a line for every slice
    path = tmp_path / "m.gguf"
    interrupt(path, 20)
    of_another_rank(path, 1, 4, 9)
    of_another_rank(path, 12, 2, 4)
    with begin(path) as out:
        left = [(tensor, row) for tensor, row in slices() if not out.done(tensor.name, row, row + 1)]
        assert left == slices()[20:]
        fill(out, left)
    assert path.read_bytes() == write(tmp_path / "whole.gguf")[0].read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.gguf", "whole.gguf"]


def test_ledgers_of_other_ranks_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writer, "SYNC_BYTES", 1)
    path = tmp_path / "m.gguf"
    interrupt(path, 20)
    other = of_another_rank(path, 1, 4, 9, checkpoint="of another job")
    with pytest.raises(RuntimeError), begin(path) as out:
        assert sum(out.done(tensor.name, row, row + 1) for tensor, row in slices()) == 15
        raise RuntimeError
    held = Ledger(other)
    for restart in (False, True):
        with pytest.raises(QuantkitError, match=r"ledger\.1: another process is writing"):
            begin(path, restart=restart)
    held.close()
    other.write_text("{}\n[]\n")
    with pytest.raises(QuantkitError, match=r"ledger\.1: damaged"):
        begin(path)
    with begin(path, restart=True) as out:
        assert not other.exists()
        fill(out, slices())
    assert path.read_bytes() == write(tmp_path / "whole.gguf")[0].read_bytes()
