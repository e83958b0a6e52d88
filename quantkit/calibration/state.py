"""What a calibration pass has done so far, on disk, so that a stopped pass resumes at its layer.

Layout of the folder (safetensors, so that any tool can look):

    hidden.safetensors   `hidden` [n_chunk, t, d] after the last finished layer, in the pass's hidden dtype;
                         metadata: `layer` (the next one to run), `job` (sha256 of what the pass depends on)
    layer-<N>.safetensors  `<tensor>.in_sum2` float32 [n_matrices, n_in] and `<tensor>.counts` float32 of layer N

Of a large pass the hidden states are written after every EVERY layers only: R1's of 917,504 tokens are 13 GB, more than
a layer of its checkpoint.

A layer's statistics are written before the hidden states that include it, each file under a temporary name first, so
the folder is consistent at any moment.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors_header import encode_header
from quantkit.sizes import gb
from quantkit.tensors import Importance

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
WRITE_BYTES = 64 << 20
LARGE, EVERY = 4 << 30, 4  # bytes of hidden states that are not written after each layer


class PassState:
    """The state folder of one pass. `job` names what it depends on; the state of another job is an error.

    All ranks resume from it, rank 0 alone saves.
    """

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job

    def resume(self) -> tuple[torch.Tensor | None, int]:
        """Hidden states and the layer to go on with; (None, 0) if nothing was saved."""
        path = self.folder / "hidden.safetensors"
        if not path.exists():
            return None, 0
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                hidden = file.get_tensor("hidden")
            layer = int(about["layer"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise QuantkitError(f"{path}: not a calibration state ({error}); remove {self.folder}") from None
        if about.get("job") != self.job:
            raise QuantkitError(f"{self.folder} is the state of another calibration; remove it or use --restart")
        return hidden, layer

    def save(self, layer: int, hidden: torch.Tensor, entries: dict[str, Importance]) -> None:
        """Record that `layer` is finished; QuantkitError if the disk does not take it (the layer before stays)."""
        if ranks.index():
            return
        try:
            self._save(layer, hidden, entries)
        except (SafetensorError, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise QuantkitError(f"{self.folder}: cannot save layer {layer} ({reason}); run again to resume") from None

    def _save(self, layer: int, hidden: torch.Tensor, entries: dict[str, Importance]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, entry in entries.items():
            tensors[f"{name}.in_sum2"] = torch.from_numpy(entry.in_sum2)
            tensors[f"{name}.counts"] = torch.from_numpy(entry.counts)
        self._write(f"layer-{layer}.safetensors", tensors, {})
        if hidden.nbytes <= LARGE or (layer + 1) % EVERY == 0:
            self._write_hidden(hidden, {"layer": str(layer + 1), "job": self.job})

    def _write(self, name: str, tensors: dict[str, torch.Tensor], about: dict[str, str]) -> None:
        part = self.folder / (name + ".part")
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, about)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, self.folder / name)

    def _write_hidden(self, hidden: torch.Tensor, about: dict[str, str]) -> None:
        """A few chunks at a time: save_file would copy all of it, gigabytes for a large job, in memory."""
        head, _ = encode_header({"hidden": (DTYPES[hidden.dtype], hidden.shape)}, about)
        part = self.folder / "hidden.safetensors.part"
        with open(part, "wb") as file:
            file.write(head)
            for chunk in hidden.split(max(1, WRITE_BYTES // hidden[:1].nbytes)):
                file.write(memoryview(chunk.cpu().contiguous().view(torch.uint8).numpy()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.folder / "hidden.safetensors")

    def entries(self, n_layer: int) -> dict[str, Importance]:
        """Statistics of layers 0 .. n_layer - 1."""
        found: dict[str, Importance] = {}
        for layer in range(n_layer):
            path = self.folder / f"layer-{layer}.safetensors"
            try:
                tensors = load_file(path)
            except (SafetensorError, OSError) as error:
                raise QuantkitError(f"{path}: {error}; remove {self.folder} and start again") from None
            names = [key.removesuffix(".in_sum2") for key in tensors if key.endswith(".in_sum2")]
            for name in sorted(names):
                sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
                found[name] = Importance(sums.numpy(), counts.numpy())
        return found

    def check_disk(self, n_bytes: int) -> None:
        """QuantkitError unless hidden states of so many bytes have room, the new ones beside the old."""
        there = sum(path.stat().st_size for path in self.folder.glob("*"))
        parent = next(path for path in self.folder.absolute().parents if path.exists())
        if 2 * n_bytes - there > (free := shutil.disk_usage(parent).free):
            needs = f"the state of the pass needs {gb(2 * n_bytes)}, {gb(free)} are free"
            raise QuantkitError(f"{self.folder}: {needs}; take fewer --tokens")

    def remove(self) -> None:
        """Delete the folder, if it is there."""
        if ranks.index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
