"""What tiny-r1's MTP layer drafts, against the code that trained it; and what tiny-v3.2's indexer chooses."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dsa_models import drafted

from quantkit.calibration.collect import Accumulator, collect
from quantkit.calibration.corpus import TextChoice, cut
from quantkit.calibration.state import PassState
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits, job_of

SCRIPTS = Path(__file__).parents[2] / "scripts"
TOP_K = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> CheckpointSource:
    sys.path += [str(SCRIPTS / "tiny_v32"), str(SCRIPTS / "tiny_r1")]
    from assemble import assemble

    return CheckpointSource(open_weights(assemble(tmp_path_factory.mktemp("trained") / "tiny-v3.2")))


def text(source: CheckpointSource, n_chunk: int, t: int) -> torch.Tensor:
    choice = TextChoice(n_tokens=n_chunk * t, chunk=t)
    return cut(choice.corpus("evaluation"), source, choice).tokens[:n_chunk]


def loss(logits: torch.Tensor, following: torch.Tensor) -> float:
    return float(F.cross_entropy(logits.flatten(0, 1), following.flatten()))


def test_drafts_as_well_as_it_was_trained_to(source):
    """Within the top-k, where attention is dense in both."""
    import export
    import model

    tokens = text(source, 8, TOP_K)
    params, bias, config = export.load_checkpoint(Path(model.__file__).parents[2] / "models" / "tiny-r1")
    weights, rope = model.prepare(params, torch.float32, False), model.rope_tables(config, TOP_K - 2, "cpu")
    with torch.no_grad():
        main, mtp, _ = model.losses(weights, bias, tokens, rope, config)
    seen, logits = drafted(source, tokens)
    ours = source.head()[1](seen)
    print(f"next token {main.mean():.4f} nats, the one after it {mtp.mean():.4f}")
    assert loss(logits[:, :-1], tokens[:, 2:]) == pytest.approx(float(mtp.mean()), abs=1e-4)
    assert loss(ours[:, :-1], tokens[:, 1:-1]) < 3 and float(mtp.mean()) < 3.5  # of 6.6 by chance


@torch.inference_mode()
def test_the_indexer_chooses_what_matters(source):
    """Of 512 positions 64: close to all of them, and far from the last 64."""
    tokens = text(source, 8, 512)
    norm, head = source.head()

    def score(one: CheckpointSource) -> float:
        logits = head_logits(one, (norm, head), final_hidden(one, tokens))
        return loss(logits[:, 256:-1], tokens[:, 257:])

    sparse = score(source)
    dense = CheckpointSource(Checkpoint.open(source.checkpoint.path))
    dense.config = family.from_hf(dense.checkpoint.config | {"index_topk": 2048})
    all_seen = score(dense)
    print(f"{all_seen:.4f} nats with all positions, {sparse:.4f} with {TOP_K}")
    assert all_seen < sparse < all_seen + 0.1


def test_a_stopped_pass_goes_on_at_the_mtp_layer_and_behind_it(source, tmp_path):
    tokens = text(source, 4, 128)
    n_layer, job = source.config.n_layer, job_of(source, tokens)
    whole = collect(source, tokens)
    assert whole[f"blk.{n_layer}.nextn.eh_proj.weight"].counts.tolist() == [4 * 127]
    assert whole[f"blk.{n_layer}.indexer.attn_k.weight"].counts.tolist() == [4 * 127]

    def stop(layer: int) -> Accumulator:
        if layer == n_layer:
            raise KeyboardInterrupt
        return Accumulator(layer, source.config.n_expert)

    with pytest.raises(KeyboardInterrupt):
        collect(source, tokens, PassState(tmp_path / "state", job), watch=stop)
    seen = []
    for finished in ([n_layer, n_layer + 1], [n_layer + 1]):  # stopped before it, and behind it
        again = collect(source, tokens, PassState(tmp_path / "state", job), progress=seen.append)
        assert seen == finished and again.keys() == whole.keys()
        assert all((again[name].in_sum2 == entry.in_sum2).all() for name, entry in whole.items())
        seen.clear()
