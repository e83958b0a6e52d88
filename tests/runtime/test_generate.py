"""Drawing a token from logits."""

import numpy as np
import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.generate import Sampling, _kept, draw, sample


def plain(logits: torch.Tensor, how: Sampling) -> set[int]:
    """What the rules leave, with everything sorted."""
    best, order = (logits / how.temperature).double().softmax(-1).sort(descending=True)
    n = how.top_k or len(best)
    best, order = best[:n], order[:n]
    share = best / best.sum()
    kept = (share.cumsum(-1) - share < how.top_p) & (best >= how.min_p * best[0])
    kept[0] = True
    return set(order[kept].tolist())


def test_tokens_that_rules_leave_are_found_without_sorting_all():
    generator, sizes = torch.Generator().manual_seed(1), set()
    for i in range(120):
        logits = torch.randn((1, 50, 700, 3000)[i % 4], generator=generator) * (0.3, 2.0, 5.0)[i % 3]
        how = Sampling(0.7, (0.95, 0.5, 0.0)[i // 4 % 3], 0, (0, 1, 40, 1000)[i // 12 % 4], (0.0, 0.05)[i // 60])
        ids = _kept(np.exp((logits - logits.max()).numpy() / np.float32(how.temperature)), how)
        assert ids is not None and set(ids.tolist()) == plain(logits, how), how
        sizes.add(len(ids))
    assert min(sizes) == 1 and max(sizes) > 1000  # few, and so many that all had to be looked at


def test_of_equally_probable_tokens_as_many_are_left_as_it_takes():
    p = np.ones(5000, np.float32)
    for how, n in ((Sampling(1.0, 0.5), 2500), (Sampling(1.0, 1.0, top_k=7), 7), (Sampling(1.0, 0.5, top_k=8), 4)):
        ids = _kept(p, how)
        assert ids is not None and ids.tolist() == list(range(n))
    assert _kept(p, Sampling(1.0, 1.0)) is None


@pytest.mark.parametrize("how", [Sampling(1.0, 1.0), Sampling(1.7, 0.8, top_k=60, min_p=0.01)])
def test_tokens_are_drawn_as_often_as_they_are_probable(how):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2500, generator=generator) * 3
    kept = sorted(plain(logits, how))
    n, p = 4000, torch.zeros(len(logits))
    p[kept] = (logits[kept] / how.temperature).softmax(-1)
    counts = torch.tensor(np.bincount([sample(logits, how, generator) for _ in range(n)], minlength=len(p)))
    best = p.topk(20).indices
    off = (counts[best] - n * p[best]) ** 2 / (n * p[best])
    assert float(off.sum()) < 45  # chi squared of 20: exceeded once in a thousand
    assert counts[kept].sum() == n and (len(kept) == len(p)) == (how.top_k == 0)


def test_what_has_no_probability_is_never_drawn():
    p = np.zeros(4000, np.float32)
    p[[1500, 3000]] = 1
    assert [draw(p, at) for at in (0.0, 0.4999, 0.5, 1 - 2**-53)] == [1500, 1500, 3000, 3000]
    p = np.zeros(2048, np.float32)
    p[[0, 1025]] = 2**-31 + 3 * 2**-54, 1  # whose sum is rounded up, so that what is left of it begins below 0
    assert [draw(p, at) for at in (0.0, float(p[0]))] == [0, 1025]
    for bad in (torch.full((5,), torch.nan), torch.full((5,), -torch.inf), torch.tensor([0.0, torch.inf])):
        for how in (Sampling(), Sampling(temperature=0)):
            with pytest.raises(QuantkitError, match="no finite numbers"):
                sample(bad, how, torch.Generator())
