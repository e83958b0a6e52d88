"""Experts that see few tokens, as R1's do: the product's encoder against ggml's at equal types and bytes.

    python scripts/research/starve.py MODEL CALIB.txt EVAL.txt [OTHER.txt ...] --chunks 4 16 32 120 --out DIR

The model's other matrices see --total chunks of 512 tokens, spread over the text; routed experts only the first
--chunks of them (in a fixed random order). R1 with 131,072 tokens gives an expert 0.6 tokens for each dimension of
gate and up; proxy models of 512 dimensions and 4 of 24 experts need 4 chunks for that. --everything starves all
matrices alike. KLD over the second halves of chunks; texts after EVAL.txt chose nothing.
"""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from quantkit.calibration import coverage
from quantkit.calibration.collect import collect
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions, LayerWriter
from quantkit.formats.checkpoint import Checkpoint
from quantkit.machine import chosen_device
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.planning.assign import make_plan
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import Source, final_hidden, head_tiles
from quantkit.runtime.watch import ExpertVisit

CHUNK = 512


class StarvedFile(FileEncoder):
    """A file whose experts see only tokens before `most`."""

    most: int | None = None

    def watch(self, layer: int) -> "StarvedLayer":
        return StarvedLayer(layer, self)


class StarvedLayer(LayerWriter):
    file: StarvedFile

    def observe_expert(self, visit: ExpertVisit) -> None:
        if self.file.most is not None:
            seen = visit.tokens < self.file.most
            rows = (visit.tokens[seen], visit.x[seen], visit.hidden[seen], visit.weight[seen])
            visit = ExpertVisit(visit.expert, *rows, visit.matrices)
        super().observe_expert(visit)


def chunks(source: Source, text: Path, most: int) -> torch.Tensor:
    """int64 [n, CHUNK] of a text, spread over it; BOS first."""
    ids = torch.tensor(source.tokenizer().encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids)
    whole = ids[: len(ids) // CHUNK * CHUNK].view(-1, CHUNK)
    at = torch.linspace(0, len(whole) - 1, min(most, len(whole))).round().long()
    whole = whole[at].clone()
    whole[:, 0] = source.config.bos
    return whole


def cut_texts(
    source: Source, texts: tuple[Path, ...], total: int, n_scored: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Chunks of the first text in a random order that is always the same, and of each other one by its name."""
    text, *others = texts
    tokens = chunks(source, text, total)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    return tokens, {other.stem: chunks(source, other, n_scored) for other in others}


def scored(source: Source, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities of the second halves, a few chunks at a time: float32 [n, n_vocab]."""
    hidden = final_hidden(source, tokens)[:, CHUNK // 2 : -1].flatten(0, 1)
    for tile in head_tiles(source, source.head(), hidden):
        yield tile.log_softmax(-1)


def divergence(original: Source, file: Source, tokens: torch.Tensor) -> float:
    """Mean KLD, nats a token."""
    total = n = 0.0
    for p, q in zip(scored(original, tokens), scored(file, tokens), strict=True):
        total += float((p.exp() * (p - q)).sum(-1).double().sum())
        n += len(p)
    return total / n


def write(
    checkpoint: Checkpoint, plan: Plan, tokens: torch.Tensor, most: int | None, out: Path, ours: EncoderOptions | None
) -> Path:
    """The file of the product's one pass, with experts that see `most` tokens; by ggml, or by our encoders."""
    device = chosen_device()
    source = CheckpointSource(checkpoint, device, torch.float32)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with open_writer(checkpoint, plan, Output(out / "file.gguf")) as writer:
        file = StarvedFile(source, plan, writer, LayerOptions(ours))
        file.most = most
        measured = coverage.shrink(collect(source, tokens, turns=file.turns, watch=file.watch), 32)
        encode_pending(checkpoint, plan, fit_importance(plan, measured), writer, GgmlEncoder())
    return writer.files[0]


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="llama.cpp", show_default=True)
@click.option("--chunks", "counts", multiple=True, type=int, default=(4, 16, 32, 120), show_default=True)
@click.option("--total", default=120, show_default=True)
@click.option("--everything", is_flag=True, help="All matrices see as little as the experts.")
@click.option("--scored", "n_scored", default=107, show_default=True, help="Chunks of each text after the first.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.inference_mode()
def main(
    model: str,
    texts: tuple[Path, ...],
    recipe: str,
    target: str,
    counts: tuple[int, ...],
    total: int,
    everything: bool,
    n_scored: int,
    out: Path,
) -> None:
    """Print KLD of both encoders for each number of chunks, and keep it in OUT/starve.json."""
    checkpoint = open_weights(model)
    original = CheckpointSource(checkpoint, chosen_device(), torch.float32)
    plan = make_plan(family.specs(original.config), Recipe.load(recipe), target, model="starved")
    tokens, judged = cut_texts(original, texts, total, n_scored)
    rows = []
    for count in counts:
        for encoder in ("ggml", "quantkit"):
            started = time.perf_counter()
            mine, most = (tokens[:count], None) if everything else (tokens, count * CHUNK if count < total else None)
            ours = EncoderOptions() if encoder == "quantkit" else None
            path = write(checkpoint, plan, mine, most, out / encoder, ours)
            file = open_source(path, original.device, torch.float32)
            kld = {name: divergence(original, file, ids) for name, ids in judged.items()}
            rows.append({"chunks": count, "encoder": encoder, "everything": everything, "kld": kld})
            figures = "  ".join(f"{name} {value:.4f}" for name, value in kld.items())
            print(f"{count:4} chunks  {encoder:8}  {figures}  {time.perf_counter() - started:.0f} s", flush=True)
        ggml, ours = rows[-2]["kld"], rows[-1]["kld"]
        print(f"{count:4} chunks  ratio     " + "  ".join(f"{name} {ours[name] / ggml[name]:.3f}" for name in ggml))
    (out / "starve.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
