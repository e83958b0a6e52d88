"""Reading GGUF: one file or all its splits as one table, tensor bytes as zero-copy views."""

import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Self

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import open_regular
from quantkit.formats.gguf_header import GGUFTensor, Header, MetaValue, parse_header
from quantkit.formats.gguf_spec import SPLIT_COUNT, SPLIT_NAME, SPLIT_NO, SPLIT_TENSORS, split_path
from quantkit.tensors import ROUTED_ROLES


class GGUFFile:
    """A GGUF model, read-only, its splits merged.

    path: as it was opened. files: all files, in split order. metadata: of the first file. tensors: name -> GGUFTensor,
    in file order; of a file of others as ours would have them, and as_stored as they are (`seen`).
    """

    def __init__(
        self,
        path: Path,
        files: list[Path],
        metadata: dict[str, MetaValue],
        tensors: dict[str, GGUFTensor],
        maps: Mapping[Path, mmap.mmap],
    ) -> None:
        self.path, self.files, self.metadata, self.tensors, self._maps = path, files, metadata, tensors, maps
        self.as_stored: Mapping[str, GGUFTensor] = tensors
        self._times = {file: os.stat(file).st_mtime_ns for file in files}

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the headers of a file, or of all splits given any one of them; no tensor data.

        QuantkitError naming the file for a malformed header, or for a split that is missing or belongs elsewhere.
        """
        path = Path(path)
        maps = {path: _map(path)}
        header = parse_header(maps[path], path)
        files = _split_files(path, header)
        headers = {path: header}
        for file in files:
            if file not in headers:
                maps[file] = _map(file)
                headers[file] = parse_header(maps[file], file)
        tensors = _merge(files, headers)
        return cls(path, files, headers[files[0]].metadata, tensors, maps)

    def seen(self, tensors: Mapping[str, GGUFTensor]) -> Self:
        """The same file, whose bytes are seen as these tensors."""
        found = type(self)(self.path, self.files, self.metadata, dict(tensors), self._maps)
        found.as_stored = self.as_stored
        return found

    def data(self, name: str) -> np.ndarray:
        """uint8 [*shape[:-1], row_bytes]: a view of the mapped file, never a copy; contiguous but for a `stride`."""
        tensor = self._tensor(name)
        if tensor.stride is not None:
            strides, shape = (tensor.stride, tensor.row_bytes, 1), (*tensor.shape[:-1], tensor.row_bytes)
            return np.ndarray(shape, np.uint8, self._maps[tensor.file], tensor.offset, strides)
        flat = np.frombuffer(self._maps[tensor.file], np.uint8, tensor.n_bytes, tensor.offset)
        return flat.reshape(*tensor.shape[:-1], tensor.row_bytes)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, row_bytes], a view: rows of a tensor, those of all its matrices counted on. They must
        lie within one matrix where the tensor has a `stride`."""
        data = self.data(name)
        if data.flags.c_contiguous:
            return data.reshape(-1, data.shape[-1])[start:stop]
        matrix, first = divmod(start, data.shape[1])
        return data[matrix, first : first + stop - start]

    def matrix(self, name: str, index: int) -> np.ndarray:
        """uint8 [n_out, row_bytes]: one matrix (expert or head) of a 3-D tensor."""
        data = self.data(name)
        if data.ndim != 3 or not 0 <= index < len(data):
            raise QuantkitError(f"{self.path}: tensor {name!r} {list(data.shape[:-1])} has no matrix {index}")
        return data[index]

    def set_apart(self, name: str) -> None:
        """The tensor will not be read through the mapping: reading its neighbours must not map pages of it, as Linux
        does with what it has cached nearby, unless they are advised differently."""
        tensor = self._tensor(name)
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = tensor.n_bytes if tensor.stride is None else tensor.shape[0] * tensor.stride
        end = min(len(self._maps[tensor.file]), tensor.offset + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            self._maps[tensor.file].madvise(mmap.MADV_RANDOM, begin, end - begin)

    def check_model(self) -> None:
        """QuantkitError for a GGUF that says that it is something else: an imatrix, an adapter, a projector."""
        if (kind := self.metadata.get("general.type", "model")) != "model":
            raise QuantkitError(f"{self.path}: is no model: its general.type is {kind}")

    def check_whole(self) -> None:
        """QuantkitError if a file was cut short since it was mapped: reading what it lost would end the process with
        SIGBUS, as it still can between this and the reading. Takes a microsecond a file."""
        for path, mapped in self._maps.items():
            if mapped.size() < len(mapped):
                raise QuantkitError(f"{path}: was cut short while it was in use; put it back and start again")

    def check_unchanged(self, name: str) -> None:
        """QuantkitError if the file of this tensor was written to since it was opened. Takes microseconds."""
        path = self._tensor(name).file
        if os.stat(path).st_mtime_ns != self._times[path]:
            raise QuantkitError(f"{path}: was changed since it was opened; let it be, and start again")

    def let_go(self) -> None:
        """Give back the mapped pages that were read so far; they are mapped again if they are read again."""
        for file in self._maps.values():
            file.madvise(mmap.MADV_DONTNEED)

    def read_into(self, name: str, index: int, out: np.ndarray, keep: bool = False) -> None:
        """Copy one matrix of a 3-D tensor to `out` (uint8, contiguous), past the mapping: neither this process nor,
        unless it shall keep them, the system holds the pages it was read from. May be called from several threads."""
        tensor = self._tensor(name)
        size = tensor.n_bytes // tensor.shape[0]
        offset, rest = tensor.offset + index * (tensor.stride or size), out.reshape(-1).data
        fd = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while rest:
                if not (n := os.preadv(fd, [rest], offset + size - len(rest))):
                    raise QuantkitError(f"{tensor.file}: the file ends within tensor {name!r}: was it changed?")
                rest = rest[n:]
            if not keep:
                os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def fingerprint(self) -> str:
        """Of the headers, and of where and how large the files are: reading a 131 GB file to hash it takes minutes."""
        facts = [(t.name, t.qtype, t.shape, t.file.name, t.offset) for t in self.tensors.values()]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr((facts, stats)).encode()).hexdigest()

    def sizes(self) -> dict[str, float]:
        """bytes of the file(s), bpw of all weights and of the routed experts (tensor data bits per weight)."""

        def bpw(tensors: Iterable[GGUFTensor]) -> float:
            tensors = list(tensors)
            weights = sum(prod(tensor.shape) for tensor in tensors)
            return 8 * sum(tensor.n_bytes for tensor in tensors) / weights if weights else 0.0

        every = self.tensors.values()
        routed = bpw(tensor for tensor in every if tensor.role in ROUTED_ROLES)
        return {"bytes": sum(path.stat().st_size for path in self.files), "bpw": bpw(every), "bpw_routed": routed}

    @property
    def n_bytes(self) -> int:
        """Size of all files in bytes."""
        return sum(len(mapped) for mapped in self._maps.values())

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise QuantkitError(f"{self.path}: no tensor {name!r}") from None


def model_file_name(path: Path) -> str:
    """Its name without suffix, and without the number of a split."""
    split = SPLIT_NAME.fullmatch(path.name)
    return split["stem"] if split else path.name.removesuffix(".gguf")


def _map(path: Path) -> mmap.mmap:
    fd = open_regular(path)
    try:
        if os.fstat(fd).st_size == 0:
            raise QuantkitError(f"{path}: the file is empty")
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot map ({error.strerror})") from None
    finally:
        os.close(fd)


def _split_files(path: Path, header: Header) -> list[Path]:
    """All files of the model that `path` is part of, in order; QuantkitError if one is missing."""
    named = SPLIT_NAME.fullmatch(path.name)
    count = header.metadata.get(SPLIT_COUNT, 0)
    if type(count) is not int or not 0 <= count <= 99_999:
        raise QuantkitError(f"{path}: bad {SPLIT_COUNT} {count!r}")
    if count <= 1 and (named is None or int(named["count"]) <= 1):
        return [path]
    if named is None or int(named["count"]) != count:
        raise QuantkitError(f"{path}: {SPLIT_COUNT} is {count}, the file name says otherwise (was it renamed?)")
    whole = path.with_name(named["stem"] + ".gguf")
    files = [split_path(whole, number, count) for number in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise QuantkitError(f"{path.parent}: {len(missing)} of {count} splits are missing, first {missing[0]}")
    return files


def _merge(files: list[Path], headers: Mapping[Path, Header]) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for number, file in enumerate(files):
        header = headers[file]
        if len(files) > 1:
            _check_split(file, header, number, len(files))
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise QuantkitError(f"{file}: tensor {name!r} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    total = headers[files[0]].metadata.get(SPLIT_TENSORS, len(tensors))
    if len(files) > 1 and total != len(tensors):
        raise QuantkitError(f"{files[0]}: {SPLIT_TENSORS} is {total}, the splits hold {len(tensors)}")
    return tensors


def _check_split(file: Path, header: Header, number: int, count: int) -> None:
    found = header.metadata.get(SPLIT_NO), header.metadata.get(SPLIT_COUNT)
    if found != (number, count):
        raise QuantkitError(f"{file}: {SPLIT_NO}, {SPLIT_COUNT} are {found}, the name says {(number, count)}")
