"""Perplexity and Kullback-Leibler divergence of a model from its reference, over tiles of logits.

Definitions as in llama-perplexity --kl-divergence: chunks start with BOS, the second half of each is scored; KLD is
sum p (log p - log q) with p the reference, in nats; RMS delta-p is over the probability of the true token, in percent.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch


@dataclass
class Divergence:
    """Per scored token, on the CPU: negative log-likelihoods, KLD, same top token, difference in probability."""

    nll: list[torch.Tensor] = field(default_factory=list)
    nll_reference: list[torch.Tensor] = field(default_factory=list)
    kld: list[torch.Tensor] = field(default_factory=list)
    same_top: list[torch.Tensor] = field(default_factory=list)
    delta_p: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """reference, logits float32 [n, n_vocab]; targets int64 [n], the true next tokens."""
        log_p, log_q = reference.log_softmax(-1), logits.to(reference.device).log_softmax(-1)
        rows = targets.to(reference.device).unsqueeze(1)
        true_p, true_q = log_p.gather(1, rows).squeeze(1), log_q.gather(1, rows).squeeze(1)
        self.nll_reference.append(-true_p.cpu())
        self.nll.append(-true_q.cpu())
        self.kld.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        self.same_top.append((log_p.argmax(-1) == log_q.argmax(-1)).cpu())
        self.delta_p.append((true_q.exp() - true_p.exp()).cpu())

    def summary(self) -> dict[str, float | int]:
        """The figures that verify.json holds. kld_mean_error and ppl_error are standard errors of the mean."""
        nll, reference, kld = torch.cat(self.nll), torch.cat(self.nll_reference), torch.cat(self.kld)
        n = len(kld)
        ppl = math.exp(nll.double().mean())
        error = 1 / math.sqrt(max(1, n - 1))
        return {
            "tokens": n,
            "ppl": ppl,
            "ppl_error": ppl * float(nll.double().std()) * error,
            "ppl_reference": math.exp(reference.double().mean()),
            "kld_mean": float(kld.double().mean()),
            "kld_mean_error": float(kld.double().std()) * error,
            "kld_median": float(kld.median()),
            "kld_p99": float(kld.kthvalue(max(1, math.ceil(0.99 * n))).values),
            "rms_dp": 100 * float(torch.cat(self.delta_p).double().square().mean().sqrt()),
            "top1_agreement": 100 * float(torch.cat(self.same_top).double().mean()),
        }


def scored(hidden: torch.Tensor) -> torch.Tensor:
    """Rows of hidden [n_chunk, t, d] whose next token is scored: the second half of each chunk but its last."""
    t = hidden.shape[1]
    return hidden[:, t // 2 : t - 1].reshape(-1, hidden.shape[-1])


def scored_targets(targets: torch.Tensor) -> torch.Tensor:
    """The true tokens that follow those rows, int64 [n]."""
    t = targets.shape[1]
    return targets[:, t // 2 + 1 :].reshape(-1)


def compare(reference: Iterable[torch.Tensor], model: Iterable[torch.Tensor], targets: torch.Tensor) -> Divergence:
    """Walk two streams of logit tiles of the same rows."""
    result, begin = Divergence(), 0
    for p, q in zip(reference, model, strict=True):
        result.add(p, q, targets[begin : begin + len(p)])
        begin += len(p)
    if begin != len(targets):
        raise ValueError(f"{begin} rows of logits for {len(targets)} targets")
    return result
