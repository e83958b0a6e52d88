#!/usr/bin/env python3
"""Put tiny-v3.2 together: tiny-r1's weights, by links, and the indexer trained for them.

    python scripts/tiny_v32/assemble.py tiny-v3.2 && quantkit make tiny-v3.2 --recipe 1.58bit --target llama.cpp

The result is a checkpoint folder as DeepSeek-V3.2's, with its MTP layer. Moved to another machine, copy it with
`cp -rL`: its links point into this repository.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open

MODELS = Path(__file__).parents[2] / "models"
TINY_R1, INDEXER = MODELS / "tiny-r1", MODELS / "tiny-v3.2" / "indexer.safetensors"
OWN = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
SIZES = {"index_n_heads": 16, "index_head_dim": 64, "index_topk": 64}


def assemble(folder: Path, indexer: Path = INDEXER) -> Path:
    """Make the folder, which must not exist; returns it."""
    folder.mkdir(parents=True)
    index = json.loads((TINY_R1 / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    names = {old: old.replace("of-000004", "of-000005") for old in shards}
    for old, new in names.items():
        (folder / new).symlink_to((TINY_R1 / old).resolve())
    last = "model-00005-of-000005.safetensors"
    (folder / last).symlink_to(indexer.resolve())
    with safe_open(indexer, "pt") as file:
        own = dict.fromkeys(file.keys(), last)
    index["weight_map"] = {name: names[shard] for name, shard in index["weight_map"].items()} | own
    index["metadata"]["total_size"] += sum(path.stat().st_size for path in [indexer])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((TINY_R1 / "config.json").read_text()) | OWN | SIZES
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY_R1 / name, folder / name)
    return folder


if __name__ == "__main__":
    print(assemble(Path(sys.argv[1])))
