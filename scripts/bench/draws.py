"""Milliseconds of CPU time that a token's drawing takes, in one thread: by numpy (`generate.pick`) and by compiled
kernels (`draws.tokens`), of one row and of 16 at once; then what it takes to ask for a token by a request's rules
(`Job.ask`), after 4,500 others. Medians of --repeats, each way in turn.

    python scripts/bench/draws.py [--vocabulary 129280]

Logits are random, of R1's vocabulary.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from quantkit.runtime import draws
from quantkit.runtime.generate import Ask, Sampling, pick
from quantkit.serving.jobs import Job
from quantkit.serving.logits import Chance, Penalties, TokenRules

ROWS = 16
NOTHING = np.empty(0, np.int64), np.empty(0, np.float32)
CASES = (  # what, how, standard deviation of the logits, tokens that a bias lifts above the others
    ("greedy", Sampling(0.0), 1, 0),
    ("temperature 1, `top_p` 1", Sampling(1.0, 1.0), 1, 0),
    ("the same, 256 tokens 60 above the others", Sampling(1.0, 1.0), 1, 256),
    ("temperature 0.6, `top_p` 0.95, standard deviation of logits 4", Sampling(0.6, 0.95), 4, 0),
    ("the same, standard deviation 1: 63,000 tokens are left", Sampling(0.6, 0.95), 1, 0),
    ("`top_k` 40, `min_p` 0.05", Sampling(1.0, 1.0, top_k=40, min_p=0.05), 1, 0),
)
RULES = {
    "none": TokenRules(),
    "`logit_bias` of 256 tokens, `ignore_eos`": TokenRules(
        bias=dict.fromkeys(range(0, 25_600, 100), 60.0), ignore_eos=True
    ),
    "`frequency_penalty`": TokenRules(penalties=Penalties(frequency=0.5)),
    "`repetition_penalty`": TokenRules(penalties=Penalties(repetition=1.1)),
    "`repeat_penalty`": TokenRules(penalties=Penalties(repeat=1.1)),
}
OLD, NEW = 4000, 500  # tokens of a prompt and of its answer


def seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    begun = time.thread_time()
    work()
    return time.thread_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=129_280)
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args()
    generator = np.random.default_rng(0)
    noise = generator.standard_normal((ROWS, args.vocabulary)).astype(np.float32)
    lifted = np.sort(generator.choice(args.vocabulary, 256, replace=False))
    draws.warm_up(args.vocabulary)
    print("| random logits | numpy | kernels, one row | 16 rows, each |\n|---|---|---|---|")
    for what, how, deviation, n in CASES:
        logits = noise * np.float32(deviation)
        edits = (lifted[:n], logits[0, lifted[:n]] + 60) if n else NOTHING
        asked = [Ask(how, uniform, *edits) for uniform in generator.random(ROWS)]
        ways = (
            lambda logits=logits, ask=asked[0]: pick(ask.edited(logits[0]), ask.how, ask.uniform),
            lambda logits=logits, asked=asked: draws.tokens(logits[:1], asked[:1]),
            lambda logits=logits, asked=asked: draws.tokens(logits, asked),
        )
        times = [[seconds(way) for way in ways] for _ in range(args.repeats)]
        old, one, many = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
        print(f"| {what} | {old:.2f} | {one:.2f} | {many / ROWS:.2f} |", flush=True)
    print("\n| rules | ms |\n|---|---|")
    for what, rules in RULES.items():
        prompt, made = (generator.integers(args.vocabulary, size=n).tolist() for n in (OLD, NEW))
        job = Job(prompt, args.repeats, Sampling(), lambda *_: None, rules, made=made)
        took = []
        for token in generator.integers(args.vocabulary, size=args.repeats).tolist():
            made.append(token)
            took.append(seconds(lambda job=job: job.ask(noise[0], [1])))
        print(f"| {what} | {1e3 * statistics.median(took):.3f} |", flush=True)
    took = [seconds(lambda: Chance.of(noise[0], 7, 5, draws.log_total(noise[0]))) for _ in range(args.repeats)]
    print(f"| log probabilities of the token and of five others | {1e3 * statistics.median(took):.3f} |")


if __name__ == "__main__":
    main()
