"""Safetensors checkpoints: index and headers are checked at `open`, weights are read one slice at a time."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats import fp4, int4
from quantkit.formats.byte_source import ByteSource, FolderSource, read_text_file
from quantkit.formats.fp8 import dequantize, scale_rows
from quantkit.formats.mistaken import packed
from quantkit.formats.safetensors_header import check_shard_name, header_length, load_json, load_object, parse_header
from quantkit.formats.tensor_entry import TensorEntry
from quantkit.formats.tensor_table import CONFIG, INTEGER_DTYPES, MAX_PROBLEMS, TensorTable, weight_of
from quantkit.formats.text_model import TextModel
from quantkit.progress import say, say_once

if TYPE_CHECKING:  # two seconds to load, which headers do without
    import torch

LARGEST, SMALLEST = 65504, 1e-6  # F16's largest; Q8_0's scale of smaller weights is below F16's smallest
INDEX, SHARD = "model.safetensors.index.json", ".safetensors"
OTHERS = ("consolidated", "adapter")  # a model's own layout beside Hugging Face's; LoRA
NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")
PREFIX = 64  # bytes of a shard that tell what it is
Needed = Callable[[Mapping[str, Any]], Collection[str]]
"""config.json -> names of the tensors that will be read."""
TORCH_DTYPE: Mapping[str, str] = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "I64": "int64",
    "I32": "int32",
    int4.DTYPE: "int32",
    fp4.DTYPE: "uint8",
}
"""By their names in torch."""


class Checkpoint(TensorTable):
    """A folder of safetensors shards, read-only. Reads may come from many threads; `close` when done.

    origin: for a checkpoint that lies elsewhere, its `repo` and `commit`, its `license` if known, and `weights`, a
    digest of the identities of its shards.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        tensors: Mapping[str, TensorEntry],
        source: ByteSource,
        fingerprint: str,
    ) -> None:
        super().__init__(path, config, tensors)
        self._source, self._fingerprint = source, fingerprint
        self.origin: dict[str, str] | None = None
        self._tiny: set[str] = set()  # matrices of which it was said
        self._zeros: set[str] = set()  # that are, of those seen so far
        for remark in self.remarks:
            say_once(remark)

    @classmethod
    def open(cls, folder: Path | str, source: ByteSource | None = None, needed: Needed | None = None) -> Self:
        """Read `config.json`, the index and all shard headers; no weights.

        Without an index `model*.safetensors` are taken (see `own_shards`). QuantkitError, naming file and tensor, for a
        missing or truncated shard, a bad header, or an index that disagrees with the headers. needed: names of the
        tensors that will be read; what is wrong with others is said in a line then, and no error.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise QuantkitError(f"{folder}: no such model folder")
        config_text = read_text_file(folder / CONFIG)
        config = load_object(config_text, str(folder / CONFIG))
        source = source or FolderSource(folder)
        try:
            text = TextModel.of(config, str(folder / CONFIG))
            index = Index.read(folder, source, needed(text.config) if needed else None, text)
            shards = sorted(set(index.weight_map.values())) if index else own_shards(source.names(), str(folder))
            headers, digest = _read_headers(folder, source, shards, config_text)
            tensors = _merge(folder, headers)
            if how := packed(tensors, text.config, int4.readable(text.config)):
                raise QuantkitError(
                    f"{folder}: {how}; quantkit starts from the original weights (BF16, F16, F32, FP8 in blocks or "
                    "compressed-tensors' INT4, FP4 with .scale)"
                )
            if index:
                index.check(tensors)
            return cls(folder, config, tensors, source, digest)
        except BaseException:
            source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files. A later read opens them again."""
        self._source.close()

    def schedule(self, kept: Sequence[str], layers: Sequence[Sequence[str]]) -> None:
        """Tell the source which tensors will be read, scales included: `kept` at any time, `layers` in turn."""
        self._source.schedule(self._extents(kept), [self._extents(names) for names in layers])

    def _extents(self, names: Sequence[str]) -> list[tuple[str, int, int]]:
        stored = (each for name in names if name in self.tensors for each in (name, self.scale_name(name)))
        found = [self.tensors.get(each) for each in stored]
        return [(str(entry.file), entry.begin, entry.end) for entry in found if entry is not None]

    def fingerprint(self) -> str:
        """Hex SHA-256 of config.json and every shard's name, size and header: a cheap identity, blind to weights."""
        return self._fingerprint

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
    ) -> "torch.Tensor":
        """Rows start:stop (of the first dimension; default all) as `dtype` (default float32) on `device`.

        FP8 is moved first and multiplied by its scale there, in float32. QuantkitError naming tensor and shard for a
        missing or wrong scale, an unsupported dtype, a short read, or a weight or scale that is not finite or that no
        GGUF type holds.
        """
        import torch

        raw, scale = self.read_raw(name, start, stop)
        raw = raw.to(device)
        if (kind := self.entry(name).dtype) in INTEGER_DTYPES:
            raise QuantkitError(f"{self.where(name, self.entry(name))} is {kind}: ids, where weights were expected")
        if scale is None:
            out = raw
        elif kind == int4.DTYPE:
            out = int4.dequantize(raw, scale)
        elif kind == fp4.DTYPE:
            out = fp4.dequantize(raw, scale)
        else:
            out = dequantize(raw, scale, self.block, start)
        if out.numel():
            self._check_range(name, out, start)
        return out.to(dtype or torch.float32)

    def _check_range(self, name: str, values: "torch.Tensor", start: int) -> None:
        """One pass without a temporary: both bounds carry any NaN, and an infinity is one of them. values: rows from
        `start` on."""
        import torch

        bounds = torch.stack(torch.aminmax(values)).float()
        largest = float(bounds.abs().max())
        if not math.isfinite(largest):
            raise QuantkitError(f"{self.where(name, self.entry(name))} has weights that are not finite")
        if largest > LARGEST:
            raise QuantkitError(
                f"{self.where(name, self.entry(name))} has a weight of {largest:.3g}; scales of GGUF types are F16 and"
                f" end at {LARGEST:,}: is its scale right?"
            )
        if 0 < largest < SMALLEST and values.ndim > 1 and name not in self._tiny:
            self._tiny.add(name)
            where = self.where(name, self.entry(name))
            say(f"{where} has only weights below {SMALLEST}: most GGUF types make zeros of it")
        if largest == 0 and start == 0 and values.ndim > 1:
            self._say_zeros(name, len(values))

    def _say_zeros(self, name: str, n_rows: int) -> None:
        """A line on a matrix that has nothing but zeros, of which the first rows have been seen to; the rest is read
        until something else comes. Not of every one: a shard that was reserved and not filled has hundreds."""
        stop = self.entry(name).shape[0]
        if name in self._zeros or any(
            bool(self.read(name, first, min(first + n_rows, stop)).any()) for first in range(n_rows, stop, n_rows)
        ):
            return
        self._zeros.add(name)
        if len(self._zeros) <= MAX_PROBLEMS:
            where = self.where(name, self.entry(name))
            say(f"warning: {where} is all zeros; if the model is not meant so, compare the file's checksum")
        elif len(self._zeros) == MAX_PROBLEMS + 1:
            say(f"warning: more matrices of {self.path} are all zeros, which are not named")

    def read_raw(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Rows start:stop as stored, on the CPU, and their scale.

        The scale is None for plain floats, else float32 [rows covering the slice, blocks across]: row r of the slice
        belongs to its row (start + r) // block - start // block. INT4 is int32 words [n, columns / 8], FP4 uint8
        [n, columns / 2], with a scale for each of the rows.
        """
        import torch

        entry = self.entry(name)
        scale_entry = self.scale_of(name, entry)
        n_rows = entry.shape[0] if entry.shape else 1
        stop = n_rows if stop is None else stop
        if not 0 <= start <= stop <= n_rows:
            raise QuantkitError(f"{self.where(name, entry)} has {n_rows} rows, {start}:{stop} were asked for")
        raw = self._rows(name, entry, start, stop)
        if scale_entry is None:
            return raw, None
        of_rows = entry.dtype in (int4.DTYPE, fp4.DTYPE)
        scale_name = self.scale_name(name)
        first, last = (start, stop) if of_rows else scale_rows(start, stop, self.block)
        scale = self._rows(scale_name, scale_entry, first, last).to(torch.float32)
        if not torch.isfinite(scale).all():
            raise QuantkitError(f"{self.where(scale_name, scale_entry)} has a scale that is not finite")
        return raw, scale

    def read_q4_0(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of an INT4 tensor as packed Q4_0 of the same numbers, uint8 [n, row_bytes] (see `int4.as_q4_0`)."""
        raw, scale = self.read_raw(name, start, stop)
        assert scale is not None
        return int4.as_q4_0(raw, scale, self.where(name + int4.SCALE, self.tensors[name + int4.SCALE]), say_once)

    def read_mxfp4(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of an FP4 tensor as packed MXFP4 of the same numbers, uint8 [n, row_bytes] (see `fp4.as_mxfp4`)."""
        import torch

        entry, scale_name = self.entry(name), self.scale_name(name)
        scale = fp4.scale_entry(name, entry, self.tensors, self.where)
        exponents = self._rows(scale_name, scale, start, stop).view(torch.uint8)
        return fp4.as_mxfp4(self._rows(name, entry, start, stop), exponents, self.where(scale_name, scale))

    def read_ids(self, name: str, start: int, stop: int, below: int) -> "torch.Tensor":
        """Rows of a table of ids, int32 [n, ...] on the CPU. QuantkitError for one that is not from 0 to below - 1, and
        for floats."""
        entry = self.entry(name)
        if entry.dtype not in INTEGER_DTYPES:
            raise QuantkitError(f"{self.where(name, entry)} is {entry.dtype}: weights, where ids were expected")
        ids = self._rows(name, entry, start, stop)
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < below):
            least, most = int(ids.min()), int(ids.max())
            raise QuantkitError(f"{self.where(name, entry)} has ids from {least} to {most}; there are {below:,}")
        return ids.int()

    def _rows(self, name: str, entry: TensorEntry, start: int, stop: int) -> "torch.Tensor":
        import torch

        assert entry.file is not None
        offset, length = entry.begin + start * entry.row_bytes, (stop - start) * entry.row_bytes
        buffer = self._source.read(entry.file, offset, length, f"tensor {name!r}")
        dtype = getattr(torch, TORCH_DTYPE[entry.dtype])
        values = torch.from_numpy(buffer).view(dtype) if length else torch.empty(0, dtype=dtype)
        if entry.dtype == int4.DTYPE:
            return values.view(stop - start, entry.shape[1] // int4.PER_WORD)
        if entry.dtype == fp4.DTYPE:
            return values.view(stop - start, entry.shape[1] // 2)
        return values.view((stop - start, *entry.shape[1:]) if entry.shape else ())


class Index:
    """model.safetensors.index.json. weight_map: tensor -> shard, but for the tensors of shards that are not there and
    that nobody needs. needed: None if all are. text: whose names `needed` has."""

    def __init__(
        self, folder: Path, weight_map: dict[str, str], needed: Collection[str] | None, text: TextModel
    ) -> None:
        self.folder, self.weight_map, self.needed, self.text = folder, weight_map, needed, text

    @classmethod
    def read(cls, folder: Path, source: ByteSource, needed: Collection[str] | None, text: TextModel) -> Self | None:
        """None if the folder has no index. QuantkitError if a shard with needed tensors is missing."""
        names = set(source.names())
        if INDEX not in names:
            return None
        where = str(folder / INDEX)
        index = load_json(read_text_file(folder / INDEX, "index"), where)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise QuantkitError(f"{where}: no weight_map")
        shards = Counter(check_shard_name(shard, where) for shard in weight_map.values())
        self = cls(folder, weight_map, needed, text)
        missing = sorted(set(shards) - names)
        for name, shard in weight_map.items() if missing else ():
            if shard not in names and self._is_needed(name):
                others = f" ({len(missing)} of {len(shards)} shards are missing)" if len(missing) > 1 else ""
                raise QuantkitError(f"{folder / shard}: no such file; the index places tensor {name!r} there{others}")
        if missing:
            say_once(f"warning: {folder / missing[0]}: no such file; nothing in it is needed")
            self.weight_map = {name: shard for name, shard in weight_map.items() if shard in names}
        return self

    def check(self, tensors: Mapping[str, TensorEntry]) -> None:
        """QuantkitError if a needed tensor lies elsewhere than the index says, or nowhere."""
        for name, shard in self.weight_map.items():
            if name not in tensors:
                self._wrong(name, f"{self.folder / shard}: tensor {name!r} is missing; {INDEX} places it there")
            elif tensors[name].file != shard:
                self._wrong(name, f"{self.folder / shard}: tensor {name!r} is missing; it lies in {tensors[name].file}")
        for name in tensors.keys() - self.weight_map.keys():
            self._wrong(name, f"{self.folder / str(tensors[name].file)}: tensor {name!r} is not in {INDEX}")

    def _wrong(self, name: str, line: str) -> None:
        if self._is_needed(name):
            raise QuantkitError(line)
        say_once(f"warning: {line}; it is not needed")

    def _is_needed(self, name: str) -> bool:
        own = self.text.name(name)
        if self.needed is None or own is None:
            return self.needed is None
        return weight_of(own) in self.needed


def own_shards(names: Iterable[str], where: str) -> list[str]:
    """The model's files among these where there is no index: `model*.safetensors` if there are any, else all but those
    of other layouts. QuantkitError if a numbered one is missing."""
    found = sorted(name for name in names if name.endswith(SHARD) and "/" not in name)
    own = [name for name in found if name.startswith("model")] or [n for n in found if not n.startswith(OTHERS)]
    if not own:
        adapter = any(name.startswith("adapter") for name in found)
        what = "merge the adapter into its base model first" if adapter else "not in Hugging Face's layout"
        raise QuantkitError(
            f"{where}: only {found[0]} here; {what}" if found else f"{where}: no {INDEX} and no *{SHARD} here"
        )
    numbered = [match for match in map(NUMBERED.fullmatch, own) if match]
    for match in numbered[:1]:
        whole = [f"{match[1]}-{i:0{len(match[2])}d}-of-{match[3]}{SHARD}" for i in range(1, int(match[3]) + 1)]
        if absent := [name for name in whole if name not in own]:
            raise QuantkitError(f"{where}: {len(absent)} of {len(whole)} shards are missing, first {absent[0]}")
    if left := [name for name in found if name not in own]:
        say_once(f"{where}: {', '.join(left)} left aside: not of the model in {own[0]}")
    return own


def _read_headers(
    folder: Path, source: ByteSource, shards: list[str], config_text: bytes
) -> tuple[dict[str, dict[str, TensorEntry]], str]:
    """Shard -> its entries, and the fingerprint of them all."""
    headers, digest = {}, hashlib.sha256(config_text)
    for shard in shards:
        size, where = source.size(shard), str(folder / shard)
        prefix = source.read(shard, 0, min(PREFIX, size), "the header length").tobytes()
        header = source.read(shard, 8, header_length(prefix, size, where), "the header").tobytes()
        digest.update(f"\0{shard}\0{size}\0{len(header)}\0".encode())
        digest.update(header)
        headers[shard] = parse_header(header, size, shard, where)
    return headers, digest.hexdigest()


def _merge(folder: Path, headers: Mapping[str, Mapping[str, TensorEntry]]) -> dict[str, TensorEntry]:
    """All shards' entries in one table."""
    tensors: dict[str, TensorEntry] = {}
    for shard, entries in headers.items():
        for name, entry in entries.items():
            if name in tensors:
                raise QuantkitError(f"{folder / shard}: tensor {name!r} is also in {tensors[name].file}")
            tensors[name] = entry
    return tensors
