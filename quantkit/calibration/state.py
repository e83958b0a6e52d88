"""What a calibration pass has done so far, on disk, so that a stopped pass resumes at its layer.

Layout of the folder (safetensors, so that any tool can look):

    hidden.safetensors   `hidden` [n_chunk, t, d] after the last finished layer, in the pass's hidden dtype;
                         metadata: `layer` (the next one to run), `job` (sha256 of what the pass depends on)
    layer-<N>.safetensors  `<tensor>.in_sum2` float32 [n_matrices, n_in] and `<tensor>.counts` float32 of layer N

Of a large pass the hidden states are written after every EVERY layers only: R1's of 917,504 tokens are 13 GB, more than
a layer of its checkpoint.

A layer's statistics are written before the hidden states that include it, each file under a temporary name first, so
the folder is consistent at any moment. Each carries a checksum (`formats.sealed`); if one is wrong, all of the pass is
computed again: a layer's inputs are not kept.
"""

import shutil
from pathlib import Path

import torch

from quantkit import machine, ranks
from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.whole_file import make_folders
from quantkit.progress import say
from quantkit.sizes import both_units
from quantkit.tensors import Importance

LARGE, EVERY = 4 << 30, 4  # bytes of hidden states that are not written after each layer


class PassState:
    """The state folder of one pass. `job` names what it depends on; the state of another job is an error.

    All ranks resume from it, rank 0 alone saves.
    """

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job

    def resume(self) -> tuple[torch.Tensor | None, int]:
        """Hidden states and the layer to go on with; (None, 0) if nothing was saved, or if what was is damaged, which
        is said. QuantkitError if it is another pass's."""
        layer = self.layers()
        if not layer:
            return None, 0
        with sealed.reading(self._hidden) as file:
            return file.get_tensor("hidden"), layer

    def layers(self) -> int:
        """How many `resume` would not go through again; the same on all ranks."""
        return ranks.agree(self._found)

    @property
    def _hidden(self) -> Path:
        return self.folder / "hidden.safetensors"

    def _found(self) -> int:
        """Layers that are done, and whole on disk."""
        if not self._hidden.exists():
            return 0
        done = 0
        if not (why := sealed.whole(self._hidden)):
            about = sealed.about(self._hidden)
            if about.get("job") != self.job:
                raise QuantkitError(f"{self.folder} is the state of another calibration; remove it or use --restart")
            done = int(about["layer"])
            why = next(filter(None, (sealed.whole(self._of(layer)) for layer in range(done))), None)
        if why:
            say(f"{why}; the pass begins anew")
            self.remove()
        return 0 if why else done

    def _of(self, layer: int) -> Path:
        return self.folder / f"layer-{layer}.safetensors"

    def save(self, layer: int, hidden: torch.Tensor, entries: dict[str, Importance]) -> None:
        """Record that `layer` is finished; QuantkitError if the disk does not take it (the layer before stays)."""
        if ranks.index():
            return
        try:
            self._save(layer, hidden, entries)
        except OSError as error:
            reason = f"{self.folder}: cannot save layer {layer} ({error.strerror})"
            raise QuantkitError(f"{reason}; run again to resume") from None

    def _save(self, layer: int, hidden: torch.Tensor, entries: dict[str, Importance]) -> None:
        make_folders(self.folder)
        tensors = {}
        for name, entry in entries.items():
            tensors[f"{name}.in_sum2"] = torch.from_numpy(entry.in_sum2)
            tensors[f"{name}.counts"] = torch.from_numpy(entry.counts)
        sealed.write(self._of(layer), tensors)
        if hidden.nbytes <= LARGE or (layer + 1) % EVERY == 0:
            sealed.write(self._hidden, {"hidden": hidden}, {"layer": str(layer + 1), "job": self.job})

    def entries(self, n_layer: int) -> dict[str, Importance]:
        """Statistics of layers 0 .. n_layer - 1."""
        found: dict[str, Importance] = {}
        for layer in range(n_layer):
            with sealed.reading(self._of(layer)) as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            names = [key.removesuffix(".in_sum2") for key in tensors if key.endswith(".in_sum2")]
            for name in sorted(names):
                sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"]
                found[name] = Importance(sums.numpy(), counts.numpy())
        return found

    def check_disk(self, n_bytes: int, file_bytes: int = 0) -> None:
        """QuantkitError unless hidden states of so many bytes have room, the new ones beside the old. file_bytes: of
        the file that the pass is still to reserve on that disk."""
        there = sum(path.stat().st_size for path in self.folder.glob("*"))
        if 2 * n_bytes - there + file_bytes > (free := machine.free_disk(self.folder)):
            beside = f" beside the file's {both_units(file_bytes)}" if file_bytes else ""
            needs = f"the state of the pass needs {both_units(2 * n_bytes)}{beside}; free are {both_units(free)}"
            raise QuantkitError(f"{self.folder}: {needs}; take fewer --tokens")

    def remove(self) -> None:
        """Delete the folder, if it is there."""
        if ranks.index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
