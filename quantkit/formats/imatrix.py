"""imatrix files: what llama-imatrix writes and llama-quantize reads, so that ours and theirs are interchangeable.

A GGUF file of type `imatrix`; for every weight X of the model `X.in_sum2`, F32 [n_matrices, n_in], and `X.counts`,
F32 [n_matrices or 1, 1] (shapes slowest first). llama-imatrix flattens the in_sum2 of 3-D attention tensors, which
have one count for all heads, to [1, n_heads * n_in]: `fit` gives it its shape back.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_layout import layout
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_values import U32, Value
from quantkit.formats.model_names import check_imatrix
from quantkit.formats.part_file import FileLayout, make_folder
from quantkit.formats.whole_file import replacing
from quantkit.tensors import Imatrix, Importance

SUMS, COUNTS = ".in_sum2", ".counts"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class ImatrixInfo:
    """Where an imatrix comes from. chunk_size: tokens per chunk."""

    datasets: list[str]
    chunk_count: int
    chunk_size: int


def save_imatrix(
    path: Path | str,
    imatrix: Mapping[str, Importance],
    *,
    datasets: Sequence[str],
    chunk_count: int,
    chunk_size: int,
) -> None:
    """Write all entries, sorted by name, under a temporary name, then rename.

    datasets: at least one name. chunk_size: tokens per chunk. QuantkitError naming the weight for sums or counts that
    are negative, not finite or do not fit each other, and for a folder that cannot be written.
    """
    path = Path(path)
    if not imatrix or not datasets:
        raise QuantkitError(f"{path}: an imatrix needs at least one weight and the name of one dataset")
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(imatrix):
        _check(f"{path}: {name}", imatrix[name])
        sums, counts = imatrix[name].in_sum2, imatrix[name].counts
        # ggml drops outer dimensions of 1; doing the same makes the file llama-imatrix's to the byte.
        arrays[name + SUMS] = sums if len(sums) > 1 else sums[0]
        arrays[name + COUNTS] = counts.reshape(-1, 1) if len(counts) > 1 else counts
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        DATASETS: list(datasets),
        CHUNK_COUNT: U32(chunk_count),
        CHUNK_SIZE: U32(chunk_size),
    }
    make_folder(path.parent)
    tensors = [PlainTensor(name, array.shape, "F32") for name, array in arrays.items()]
    _write(layout(path, tensors, metadata, None)[0], arrays)


def load_imatrix(path: Path | str) -> tuple[dict[str, Importance], ImatrixInfo]:
    """All entries by weight, and where they come from. Arrays are read-only views of the mapped file.

    QuantkitError naming file and weight for anything llama-quantize would refuse or misread: another kind of file, the
    legacy format, missing keys, sums without counts, negative or non-finite values.
    """
    path = Path(path)
    check_imatrix(path)
    file = GGUFFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        raise QuantkitError(f"{path}: a GGUF file, but not an imatrix")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    strays = set(file.tensors) - {name + suffix for name in names for suffix in (SUMS, COUNTS)}
    if strays or not names:
        raise QuantkitError(f"{path}: {min(strays)!r} has no {SUMS}" if strays else f"{path}: no entries")
    imatrix = {name: _entry(file, name) for name in names}
    return imatrix, _info(file)


def expert_counts(path: Path | str) -> dict[str, np.ndarray]:
    """Of each weight with several matrices, how many tokens chose which: float32 [n_matrices]. The sums are not looked
    at: R1's are a gigabyte. QuantkitError for a file that is no imatrix, or for counts that are none."""
    file = GGUFFile.open(path)
    if file.metadata.get("general.type") != "imatrix":
        raise QuantkitError(f"{path}: a GGUF file, but not an imatrix")
    found = {}
    for name, tensor in file.tensors.items():
        if name.endswith(COUNTS) and tensor.shape[0] > 1:
            if tensor.qtype != "F32":
                raise QuantkitError(f"{path}: {name} is not F32")
            counts = file.data(name).view("<f4").reshape(-1)
            if not (counts.min() >= 0 and counts.max() < np.inf):
                raise QuantkitError(f"{path}: {name} is negative or not finite")
            found[name.removesuffix(COUNTS)] = counts
    return found


def fit(importance: Importance, n_matrices: int, n_in: int, name: str) -> Importance:
    """The entry of a weight with n_matrices of n_in columns, in_sum2 shaped [n_matrices, n_in].

    QuantkitError naming the weight if its numbers are not as many as that.
    """
    sums, counts = importance.in_sum2, importance.counts
    if sums.size != n_matrices * n_in or counts.size not in (1, n_matrices):
        raise QuantkitError(
            f"imatrix: {name} has sums {list(sums.shape)} and {counts.size} counts, "
            f"the model {n_matrices} matrices of {n_in} columns: it is of another model"
        )
    return Importance(sums.reshape(n_matrices, n_in), counts)


def imatrix_digest(imatrix: Imatrix) -> str:
    """sha256 of all sums and counts, whatever file they came from."""
    whole = hashlib.sha256()
    for name in sorted(imatrix):
        entry = imatrix[name]
        for array in (entry.in_sum2, entry.counts):
            whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def _write(file: FileLayout, arrays: Mapping[str, np.ndarray]) -> None:
    try:
        with replacing(file.path) as out:
            out.write(file.header)
            for name, array in arrays.items():
                out.seek(file.offsets[name])
                out.write(np.ascontiguousarray(array, "<f4").data)
            out.truncate(file.size)
    except OSError as error:
        raise QuantkitError(f"{file.path}: cannot write ({error.strerror})") from None


def _entry(file: GGUFFile, name: str) -> Importance:
    where = f"{file.path}: {name}"
    for suffix in (SUMS, COUNTS):
        tensor = file.tensors.get(name + suffix)
        if tensor is None or tensor.qtype != "F32":
            raise QuantkitError(f"{where}{suffix} is missing or not F32")
    sums, counts = (file.data(name + suffix).view("<f4") for suffix in (SUMS, COUNTS))
    importance = Importance(sums.reshape(-1, sums.shape[-1]), counts.reshape(-1))
    _check(where, importance)
    return importance


def _check(where: str, importance: Importance) -> None:
    sums, counts = importance.in_sum2, importance.counts
    if sums.ndim != 2 or counts.ndim != 1 or counts.size not in (1, len(sums)):
        raise QuantkitError(f"{where}: sums {list(sums.shape)} and counts {list(counts.shape)} do not fit")
    for what, values in (("sums", sums), ("counts", counts)):
        # A NaN fails the first comparison, an infinity the second; neither makes a copy of the array.
        if not (values.min() >= 0 and values.max() < np.inf):
            raise QuantkitError(f"{where}: {what} are negative or not finite")


def _info(file: GGUFFile) -> ImatrixInfo:
    datasets = file.metadata.get(DATASETS)
    count, size = file.metadata.get(CHUNK_COUNT), file.metadata.get(CHUNK_SIZE)
    if not isinstance(datasets, list) or type(count) is not int or type(size) is not int:
        raise QuantkitError(f"{file.path}: {DATASETS}, {CHUNK_COUNT} or {CHUNK_SIZE} is missing")
    return ImatrixInfo([str(name) for name in datasets], count, size)
