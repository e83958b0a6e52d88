"""The small checkpoint."""

from pathlib import Path

import pytest
import torch
from small_checkpoint import shards, write_checkpoint


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    """All tensors of the small checkpoint, as stored."""
    return {name: tensor for tensors in shards().values() for name, tensor in tensors.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small checkpoint on disk."""
    return write_checkpoint(tmp_path / "model", shards())
