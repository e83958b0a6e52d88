"""Measured KLD against bytes: allocated plans, hand-made recipes and llama-quantize's own types, and predicted KLD.

    quantkit calibrate tiny-r1 -o tiny/imatrix.gguf
    quantkit sensitivity tiny-r1 --imatrix tiny/imatrix.gguf -o tiny --types IQ1_S,...,Q6_K --other-types Q2_K,...,Q8_0
    python scripts/bench/pareto.py tiny-r1 tiny --llama-bin llama.cpp/build/bin

FOLDER holds imatrix.gguf and sensitivity.json, and gets pareto-TARGET.json and a cache of encoded matrices.
Plans and hand recipes are encoded by ggml with that imatrix; llama-quantize makes its own files with it from a BF16
one, so only the choice of types differs. Hand recipes beyond the bundled four are the 2.51bit rules with routed experts
at Q3_K and Q4_K. Every allocated plan has at most the bytes of its rival.
"""

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from scipy.stats import spearmanr

from quantkit.calibration.corpus import TextChoice, cut
from quantkit.encoding.jobs import GgmlEncoder, Output, fit_importance, quantize
from quantkit.errors import QuantkitError
from quantkit.evaluation.divergence import HeadLogits, diverge, scored, scored_targets
from quantkit.formats.imatrix import load_imatrix
from quantkit.job.plan import damage_model, file_bytes
from quantkit.job.stages import source_of
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.planning.assign import make_plan, plan_within
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Budget, Recipe
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import final_hidden

HAND = ("1.58bit", "1.73bit", "2.22bit", "2.51bit", "Q3_K", "Q4_K")
LLAMA = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_M", "Q2_K", "IQ3_XXS", "Q3_K_M", "IQ4_XS", "Q4_K_M")
STAND_IN = {"Q4_0": "IQ4_NL"}  # llama-quantize's fallbacks, for the prediction only


@dataclass(frozen=True)
class Point:
    """One file. n_bytes: of the whole file. predicted and kld: nats a token; error: standard error of kld."""

    family: str
    name: str
    n_bytes: int
    predicted: float
    kld: float
    error: float
    top1: float


class CachedEncoder:
    """ggml's encoder; matrices that another plan encoded to the same type come from disk."""

    name = "ggml"

    def __init__(self, folder: Path):
        self.folder, self.inner = folder, GgmlEncoder()
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        digest = hashlib.blake2b(qtype.encode(), digest_size=16)
        for array in (rows, importance):
            digest.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
        path = self.folder / f"{digest.hexdigest()}.npy"
        if not path.exists():
            np.save(path, self.inner(qtype, rows, importance))
        return np.load(path)


class Bench:
    def __init__(self, model: str, folder: Path, data: tuple[str, ...], tokens: int, prior: bool):
        self.checkpoint, self.folder, self.model = open_weights(model), folder, model
        self.config = family.from_hf(self.checkpoint.config)
        self.specs = family.specs(self.config)
        self.imatrix, _ = load_imatrix(folder / "imatrix.gguf")
        self.damage = damage_model(self.specs, None if prior else folder / "sensitivity.json")
        self.encoder = CachedEncoder(folder / "cache")
        self.source = source_of(self.checkpoint, "cpu")
        choice = TextChoice(data, n_tokens=tokens)
        chunks = cut(choice.corpus("evaluation"), self.source, choice)
        self.tokens, self.targets = chunks.tokens, scored_targets(chunks.targets)
        with torch.inference_mode():
            self.clean = scored(final_hidden(self.source, self.tokens))

    def file_bytes(self, plan: Plan) -> int:
        return file_bytes(self.checkpoint, plan, None)

    def measure(self, family: str, name: str, plan: Plan) -> Point:
        path = self.folder / f"{family}-{name}.gguf"
        output = Output(path, overwrite=True, restart=True)
        quantize(self.checkpoint, plan, fit_importance(plan, self.imatrix), output, self.encoder)
        return self.judge(family, name, path)

    @torch.inference_mode()
    def judge(self, family: str, name: str, path: Path) -> Point:
        """Measure a file and remove it."""
        source = open_source(path)
        hidden = scored(final_hidden(source, self.tokens))
        heads = HeadLogits(self.source, self.clean), HeadLogits(source, hidden)
        result = diverge(*heads, self.targets, self.source.config.n_vocab).summary()
        types = {t.name: STAND_IN.get(t.qtype, t.qtype) for t in source.file.tensors.values()}
        predicted = self.damage.total(sum(self.damage.of(spec, types[spec.name]) for spec in self.specs))
        point = Point(
            family,
            name,
            path.stat().st_size,
            predicted,
            result["kld_mean"],
            result["kld_mean_error"],
            result["top1_agreement"],
        )
        path.unlink()
        click.echo(
            f"{family:<10} {name:<10} {point.n_bytes:>12,} predicted {predicted:.5f} KLD {point.kld:.5f} "
            f"± {point.error:.5f} top-1 {point.top1:.2f}"
        )
        return point

    def hand(self, name: str, target: str) -> Plan:
        if name in ("Q3_K", "Q4_K"):
            base = make_plan(self.specs, Recipe.load("2.51bit"), target, "hand")
            types = {t.name: name if t.is_routed else t.qtype for t in base.tensors}
            return self.of_types(types, target)
        return make_plan(self.specs, Recipe.load(name), target, "hand")

    def allocated(self, n_bytes: int, target: str, pinned: Plan | None = None) -> Plan:
        """At most these bytes. pinned: only routed experts are chosen, the rest keeps this plan's types."""
        recipe = Recipe.load("auto").aimed(target)
        if pinned:
            types = {tensor.name: tensor.qtype for tensor in pinned.tensors if not tensor.is_routed}
            recipe = self.recipe_of(types, target, '[[rules]]\nmatch = "ffn_*_exps"\nallocate = {}\nwhy = "open"\n')
        budget = Budget(size=n_bytes)
        return plan_within(self.specs, recipe, "auto", budget, self.damage, self.file_bytes)

    def recipe_of(self, types: dict[str, str], target: str, more: str = "") -> Recipe:
        """A recipe that gives these tensors these types."""
        rules = "".join(
            f'[[rules]]\nmatch = "{spec.name}"\nqtype = "{types[spec.name]}"\nwhy = "given"\n'
            for spec in self.specs
            if not spec.fixed and spec.name in types
        )
        head = f'name = "given"\ndescription = "given types"\ntarget = "{target}"\n'
        return Recipe.parse(head + rules + more, "given.toml")

    def of_types(self, types: dict[str, str], target: str) -> Plan:
        return make_plan(self.specs, self.recipe_of(types, target), target, "given")

    def llama(self, kind: str, llama_bin: Path) -> Point:
        """llama-quantize's own file from a BF16 one, with the same importance."""
        plain, out = self.folder / "bf16.gguf", self.folder / "llama.gguf"
        if not plain.exists():
            plan = self.of_types({spec.name: spec.fixed or "BF16" for spec in self.specs}, "llama.cpp")
            quantize(self.checkpoint, plan, {}, Output(plain), GgmlEncoder())
        command = [llama_bin / "llama-quantize", "--imatrix", self.folder / "imatrix.gguf", plain, out, kind, "1"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise click.ClickException((done.stdout + done.stderr)[-2000:])
        return self.judge("llama", kind, out)


@click.command()
@click.argument("model")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", multiple=True, help="Evaluation text. Default: the bundled mix's evaluation part.")
@click.option("--tokens", default=16384, show_default=True)
@click.option("--target", default="llama.cpp", show_default=True)
@click.option("--llama-bin", type=click.Path(path_type=Path), default=None, help="Folder with llama-quantize.")
@click.option("--prior", is_flag=True, help="Allocate by the built-in prior, not by sensitivity.json.")
@click.option("--experts-only", is_flag=True, help="Allocate routed experts alone; the rest stays as in the rival.")
@click.option("--only", default=None, help="Only these hand recipes, A,B, and their rivals.")
def main(model, folder, data, tokens, target, llama_bin, prior, experts_only, only):
    """Measure all files and write the results."""
    bench = Bench(model, folder, data, tokens, prior)
    points = []
    for name in only.split(",") if only else HAND:
        base = bench.hand(name, target)
        hand = bench.measure("hand", name, base)
        plan = bench.allocated(hand.n_bytes, target, base if experts_only else None)
        points += [hand, bench.measure("allocated", name, plan)]
        click.echo(f"    ratio {points[-1].kld / hand.kld:.3f}, bytes {points[-1].n_bytes / hand.n_bytes:.5f}")
    for kind in LLAMA if llama_bin and not only else ():
        peer = bench.llama(kind, llama_bin)
        points.append(peer)
        try:
            plan = bench.allocated(peer.n_bytes, target)
        except QuantkitError as error:
            click.echo(f"    {error}")
            continue
        points.append(bench.measure("allocated", kind, plan))
        click.echo(f"    ratio {points[-1].kld / peer.kld:.3f}, bytes {points[-1].n_bytes / peer.n_bytes:.5f}")
    kind = "".join(label for on, label in ((prior, "-prior"), (experts_only, "-experts"), (only, "-part")) if on)
    out = folder / f"pareto-{target}{kind}.json"
    out.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n", encoding="utf-8")
    for chooser in ("allocated", None):
        chosen = [point for point in points if chooser in (None, point.family)]
        rank = spearmanr([p.predicted for p in chosen], [p.kld for p in chosen]).statistic
        click.echo(f"rank correlation predicted/measured, {chooser or 'all'}: {rank:.4f} over {len(chosen)} files")


if __name__ == "__main__":
    main()
