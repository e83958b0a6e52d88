#!/usr/bin/env python3
"""Train the bundled tiny model: DeepSeek-R1's architecture and file format at a thousandth of its width.

    python scripts/tiny_r1/train.py --data FILE.txt.xz --out models/tiny-r1

FILE holds documents separated by NUL bytes. The model trains for a given time (--minutes) or number of steps (--steps)
with Muon on the matrices and AdamW on the rest; the last part of the run rounds the weights as the checkpoint will
(E4M3 in 128x128 blocks), so that the FP8 file loses nothing. `--dry-run` makes a small CPU run of it all, and
`--verify DIR --text FILE` measures the perplexity of a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import data
import numpy as np
import torch
from export import load_checkpoint, save_checkpoint
from model import Params, TinyConfig, init_params, losses, prepare, rope_tables
from tokenizers import Tokenizer
from torch import Tensor

SIZE_LIMIT = 16 * 1024 * 1024


class Muon:
    """Momentum with orthogonalized updates (Newton-Schulz) for matrices and stacks of matrices."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.1):
        self.params, self.momentum, self.weight_decay = params, momentum, weight_decay
        self.buffers = [torch.zeros_like(p) for p in params]

    @staticmethod
    def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
        """Push the singular values of a batch of matrices towards one, in BF16."""
        tall = g.shape[-2] > g.shape[-1]
        x = (g.mT if tall else g).bfloat16()
        x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
        for _ in range(steps):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply one update; matrices of one shape are orthogonalized together."""
        grads = [p.grad for p in self.params]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, self.buffers, self.momentum)  # Nesterov
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(self.params):
            groups.setdefault(tuple(p.shape[-2:]), []).append(i)
        torch._foreach_mul_(self.params, 1 - lr * self.weight_decay)
        for shape, members in groups.items():
            stacked = torch.cat([updates[i].reshape(-1, *shape) for i in members])
            stacked = self.orthogonalize(stacked).float() * (-lr * 0.2 * math.sqrt(max(shape)))
            pieces = stacked.split([updates[i].numel() // math.prod(shape) for i in members])
            for i, piece in zip(members, pieces, strict=True):
                self.params[i].add_(piece.view_as(self.params[i]))


class Trainer:
    """Holds the parameters, the optimizers and the training schedule."""

    def __init__(self, cfg: TinyConfig, tokens: Tensor, args: argparse.Namespace):
        self.cfg, self.tokens, self.args = cfg, tokens, args
        self.params = init_params(cfg, args.seed, args.device)
        self.bias = torch.zeros(len(cfg.moe_layers()), cfg.n_routed_experts, device=args.device)
        self.rope = rope_tables(cfg, args.seq_len, args.device)
        self.dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        matrices = [p for n, p in self.params.items() if p.dim() > 1 and not n.endswith(("embed", "head", "router"))]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.params.values() if id(p) not in chosen]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.losses = torch.compile(losses, dynamic=False) if args.compile else losses
        self.generator = torch.Generator().manual_seed(args.seed)
        self.order = torch.empty(0, dtype=torch.long)
        self.steps_done = 0
        self.history: list[dict] = []

    def batch(self) -> Tensor:
        """Next windows of the corpus; every epoch shifts and shuffles them. The first token becomes BOS."""
        args, span = self.args, self.args.seq_len + 2
        if len(self.order) < args.batch:
            shift = int(torch.randint(span, (1,), generator=self.generator))
            count = (len(self.tokens) - shift) // span
            self.order = torch.randperm(count, generator=self.generator) * span + shift
        starts, self.order = self.order[: args.batch], self.order[args.batch :]
        index = starts.to(args.device)[:, None] + torch.arange(span, device=args.device)
        out = self.tokens[index].long()
        out[:, 0] = 0
        return out

    def rate(self, progress: float) -> float:
        """Learning-rate factor: warm-up, constant, linear decay."""
        warm = min(1.0, (self.steps_done + 1) / self.args.warmup)
        return warm * min(1.0, max(0.0, 1.0 - progress) / self.args.decay + 0.01)

    def step(self, progress: float) -> Tensor:
        """One training step; returns the mean (main, MTP) losses."""
        args = self.args
        weights = prepare(self.params, self.dtype, progress >= args.round_from)
        main, mtp, loads = self.losses(weights, self.bias, self.batch(), self.rope, self.cfg)
        (main.mean() + args.mtp_weight * mtp.mean()).backward()
        lr = args.lr * self.rate(progress)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.muon.step(lr)
        for p in self.params.values():
            p.grad = None
        if progress < args.bias_until:
            self.balance(loads)
        self.steps_done += 1
        return torch.stack((main.detach().mean(), mtp.detach().mean()))

    @torch.no_grad()
    def balance(self, loads: Tensor) -> None:
        """Loss-free balancing: raise the bias of experts with less than the mean load, lower the others'.

        The smallest bias of a layer is kept at zero; a common shift changes no choice.
        """
        loads = loads.float()
        self.bias += self.args.bias_rate * torch.sign(loads.mean(-1, keepdim=True) - loads)
        self.bias -= self.bias.amin(-1, keepdim=True)

    def run(self, checkpoint) -> dict:
        """Train until the time or step limit; calls `checkpoint(trainer)` now and then."""
        args = self.args
        self.step(0.0)  # compiles; outside the time limit
        synchronize(args.device)
        start = time.time()
        progress, saved = 0.0, 0
        while progress < 1.0:
            loss = self.step(progress)
            elapsed = time.time() - start
            by_time = elapsed / (60 * args.minutes) if args.minutes else 0.0
            by_steps = self.steps_done / args.steps if args.steps else 0.0
            if self.steps_done % args.log_every == 0 or max(by_time, by_steps) >= 1.0:
                self.log(loss, progress, time.time() - start)
            progress = max(by_time, by_steps)
            if int(progress * 4) > saved and progress < 0.95:
                saved = int(progress * 4)
                checkpoint(self)
        synchronize(args.device)
        return {"steps": self.steps_done, "seconds": round(time.time() - start, 1)}

    def log(self, loss: Tensor, progress: float, elapsed: float) -> None:
        """Print and remember a point of the loss curve."""
        main, mtp = (round(x, 4) for x in loss.tolist())
        tokens = self.steps_done * self.args.batch * self.args.seq_len
        if not math.isfinite(main):
            raise RuntimeError(f"loss is {main} at step {self.steps_done}")
        self.history.append({"step": self.steps_done, "tokens": tokens, "loss": main, "mtp_loss": mtp})
        rate = f"{tokens / max(elapsed, 1e-9):,.0f} tokens/s"
        print(f"{elapsed:6.1f} s  step {self.steps_done}  loss {main:.4f}  mtp {mtp:.4f}  {progress:.0%}  {rate}")


def synchronize(device: str) -> None:
    """Wait for the GPU, if there is one."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def evaluate(params: Params, bias: Tensor, cfg: TinyConfig, tokens: Tensor, sizes: np.ndarray, length: int) -> dict:
    """Perplexity in FP32 over consecutive windows (the first token of each becomes BOS and is not scored)."""
    device = str(tokens.device)
    weights, rope = prepare(params, torch.float32, False), rope_tables(cfg, length, device)
    spans = tokens[: len(tokens) // (length + 2) * (length + 2)].long().view(-1, length + 2).clone()
    spans[:, 0] = 0
    total, total_mtp, n_bytes, loads = 0.0, 0.0, 0, 0
    table = torch.from_numpy(sizes).to(device)
    for part in spans.split(32):
        main, mtp, load = losses(weights, bias, part, rope, cfg)
        total += main.double().sum().item()
        total_mtp += mtp.double().sum().item()
        loads = loads + load
        n_bytes += table[part[:, 1 : length + 1]].sum().item()
    count = spans.shape[0] * length
    return {
        "tokens": count,
        "ppl": round(math.exp(total / count), 4),
        "mtp_ppl": round(math.exp(total_mtp / count), 4),
        "bits_per_byte": round(total / math.log(2) / n_bytes, 4),
        "expert_share": [[round(x, 4) for x in row] for row in (loads / loads.sum(-1, keepdim=True)).tolist()],
    }


def unigram_perplexity(train: np.ndarray, held_out: np.ndarray, vocab: int) -> float:
    """Perplexity of the held-out tokens under the training tokens' frequencies (one added to each count)."""
    counts = np.bincount(train, minlength=vocab) + 1.0
    return float(np.exp(-np.log(counts / counts.sum())[held_out].mean()))


def load_tokens(args: argparse.Namespace, cfg: TinyConfig) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """Tokenizer, training tokens and held-out tokens; all are cached in --cache if that is given."""
    cache = args.cache / "tokens.npz" if args.cache else None
    if args.tokenizer and cache and cache.exists():
        with np.load(cache) as z:
            return Tokenizer.from_file(str(args.tokenizer)), z["train"], z["held_out"]
    train_docs, held_out_docs = data.split_documents(data.read_documents(args.data))
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer))
    else:
        tokenizer = data.train_tokenizer(train_docs, cfg.vocab_size)
    train = data.tokenize(tokenizer, train_docs, args.chat_share)
    held_out = data.tokenize(tokenizer, held_out_docs, 0.0)[: args.held_out_tokens]
    if cache:
        args.cache.mkdir(parents=True, exist_ok=True)
        np.savez(cache, train=train, held_out=held_out)
    return tokenizer, train, held_out


def train(args: argparse.Namespace) -> None:
    """Tokenize, train, export, read the export back and evaluate it."""
    cfg = TinyConfig(vocab_size=args.vocab)
    args.out.mkdir(parents=True, exist_ok=True)
    clock = time.time()
    tokenizer, train_tokens, held_out = load_tokens(args, cfg)
    cfg = TinyConfig(vocab_size=tokenizer.get_vocab_size())
    print(f"{len(train_tokens):,} training and {len(held_out):,} held-out tokens in {time.time() - clock:.0f} s")
    data.save_tokenizer(tokenizer, args.out)
    trainer = Trainer(cfg, torch.from_numpy(train_tokens.astype(np.int16)).to(args.device), args)
    report: dict = {"parameters": sum(p.numel() for p in trainer.params.values())}
    sizes = data.token_bytes(tokenizer)
    held = torch.from_numpy(held_out.astype(np.int16)).to(args.device)

    def checkpoint(t: Trainer) -> None:
        save_checkpoint(t.params, t.bias, cfg, args.out)
        result = evaluate(*load_checkpoint(args.out, args.device), held[:200_000], sizes, args.seq_len)
        print(f"  checkpoint at step {t.steps_done}: held-out perplexity {result['ppl']}")

    report |= trainer.run(checkpoint)
    report["tokens"] = trainer.steps_done * args.batch * args.seq_len
    report["corpus_tokens"] = len(train_tokens)
    report["tensor_bytes"] = save_checkpoint(trainer.params, trainer.bias, cfg, args.out)
    report["unigram_ppl"] = round(unigram_perplexity(train_tokens, held_out, cfg.vocab_size), 4)
    report["held_out"] = evaluate(*load_checkpoint(args.out, args.device), held, sizes, args.seq_len)
    unrounded = evaluate(trainer.params, trainer.bias, cfg, held, sizes, args.seq_len)
    report["held_out_ppl_unrounded"] = unrounded["ppl"]
    report["loss_curve"] = trainer.history[:: max(1, len(trainer.history) // 20)] + trainer.history[-1:]
    data.write_json(args.out / "training.json", report)
    check_size(args.out)
    print(json.dumps({k: v for k, v in report.items() if k != "loss_curve"}, indent=1))


def check_size(out: Path) -> None:
    """Refuse a folder that has grown past the size limit."""
    size = sum(f.stat().st_size for f in out.iterdir())
    print(f"{out}: {size:,} bytes of {SIZE_LIMIT:,}")
    if size >= SIZE_LIMIT:
        raise SystemExit(f"{out} is larger than {SIZE_LIMIT:,} bytes; take a smaller --vocab")


def verify(args: argparse.Namespace) -> None:
    """Print the perplexity that a checkpoint reaches on the first --text-bytes of a text file."""
    params, bias, cfg = load_checkpoint(args.verify, args.device)
    tokenizer = Tokenizer.from_file(str(args.verify / "tokenizer.json"))
    text = args.text.read_bytes()[: args.text_bytes].decode("utf-8", "ignore")
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int16, device=args.device)
    print(json.dumps(evaluate(params, bias, cfg, ids, data.token_bytes(tokenizer), args.seq_len), indent=1))


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="documents separated by NUL bytes, plain or .xz")
    p.add_argument("--out", type=Path, help="folder of the checkpoint")
    p.add_argument("--tokenizer", type=Path, help="tokenizer.json to use instead of training one")
    p.add_argument("--cache", type=Path, help="folder that keeps the tokenized corpus for the next run")
    p.add_argument("--vocab", type=int, default=TinyConfig.vocab_size)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--minutes", type=float, help="training time (default: 7, unless --steps is given)")
    p.add_argument("--steps", type=int, help="training steps")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--seq-len", type=int, default=1024)
    p.add_argument("--lr", type=float, default=4e-3)
    p.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    p.add_argument("--decay", type=float, default=0.5, help="last share of the run, in which the rate falls")
    p.add_argument("--round-from", type=float, default=0.75, help="share of the run after which weights are rounded")
    p.add_argument("--mtp-weight", type=float, default=0.2)
    p.add_argument("--bias-rate", type=float, default=1e-3)
    p.add_argument("--bias-until", type=float, default=0.9, help="share of the run in which routing biases move")
    p.add_argument("--chat-share", type=float, default=0.05, help="share of documents made into dialogues")
    p.add_argument("--held-out-tokens", type=int, default=1_000_000)
    p.add_argument("--log-every", type=int, default=250)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    p.add_argument("--dry-run", action="store_true", help="a few small steps, to test the script")
    p.add_argument("--verify", type=Path, metavar="DIR", help="evaluate this checkpoint and stop")
    p.add_argument("--text", type=Path, help="text to evaluate on, with --verify")
    p.add_argument("--text-bytes", type=int, default=50_000)
    args = p.parse_args()
    if args.verify is None and (args.data is None or args.out is None):
        p.error("--data and --out are needed")
    if args.verify is not None and args.text is None:
        p.error("--verify needs --text")
    if args.dry_run:
        args.steps, args.batch, args.seq_len, args.log_every = args.steps or 4, 2, 64, 1
        args.held_out_tokens = 2_000
    if args.minutes is None and args.steps is None:
        args.minutes = 7.0
    if args.compile is None:
        args.compile = args.device.startswith("cuda")
    return args


def main() -> None:
    """Entry point."""
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.verify is not None:
        verify(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
