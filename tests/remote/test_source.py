"""A checkpoint on a Hub reads as it does from a folder, whatever happens to the connection."""

import torch

from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.open import ModelRef, open_weights


def same_tensors(a: Checkpoint, b: Checkpoint) -> None:
    for name in b.tensors:
        if not name.endswith("_scale_inv"):
            assert torch.equal(a.read(name), b.read(name)), name


def test_reads_as_from_the_folder(hub, env, sharded):
    local, remote = Checkpoint.open(sharded), open_weights(ModelRef("user/tiny-r1"))
    assert remote.fingerprint() == local.fingerprint() and remote.path.name == "tiny-r1"
    same_tensors(remote, local)
    remote.close()
