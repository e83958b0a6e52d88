"""Several users of a running server, quantkit's or llama-server, asked by the same client.

    quantkit serve FILE --parallel 65 --context 17k --port 8000 &
    llama-server -m FILE -np 65 -c 150000 -kvu --port 8001 ... &
    python scripts/bench/users.py FILE --url http://127.0.0.1:8000 --url http://127.0.0.1:8001

Streams /v1/completions. For each number of users: new tokens a second of all together, from the first request to the
last token; of each user after the first token; the time to the first token; the largest gap between two tokens of one
user. Then --stall: so many users are answered while another one sends a prompt of --long tokens; the largest gap of
those who were there before, until the long prompt's first token. What the server did in the longest gaps, `serve -v`
says.

FILE says which tokens are words: prompts are random words, and answers are drawn from some words too (logit_bias), so
that each token is a text that is sent at once; a different word in each step wakes different experts. No prompt begins
like another. Each number of users is run once uncounted, with few tokens; then medians of --rounds.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from quantkit.runtime.sources.gguf import open_gguf

ANSWERS = 256  # words that answers are drawn from
BIAS = 60.0  # of logits: random weights give far less


@dataclass
class Answer:
    """When it was asked for, when its pieces came, and how many tokens the server counts, once it ends."""

    asked: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    n_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.asked

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (self.n_tokens - 1) / (self.times[-1] - self.times[0])

    def gaps(self, begin: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens, of which the later one came within a span of time."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return [later - earlier for earlier, later in pairs if begin <= later <= end]


class Words:
    """Ids of a file's plain words: for prompts, and fewer for answers."""

    def __init__(self, file: str, seed: int):
        weights = open_gguf(file, n_threads=1)
        tokenizer, self.bos, self.draw = weights.tokenizer(), weights.config.bos, random.Random(seed)
        n = min(tokenizer.get_vocab_size(), weights.config.n_vocab)
        texts = [tokenizer.decode([i]) for i in range(n)]
        self.ids = [i for i, text in enumerate(texts) if text.strip().isalpha() and text.isascii()]
        self.bias = dict.fromkeys(map(str, self.draw.sample(self.ids, min(ANSWERS, len(self.ids)))), BIAS)

    def request(self, n_prompt: int, n_tokens: int) -> dict:
        """A request with a random prompt of so many tokens, for so many new ones."""
        return {
            "prompt": [self.bos, *self.draw.choices(self.ids, k=n_prompt - 1)],
            "max_tokens": n_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "cache_prompt": False,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "logit_bias": self.bias,
            "seed": self.draw.randrange(1 << 30),
        }


async def body(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    """What follows the headers, as it comes."""
    while chunked:
        if not (size := int((await reader.readline()).split(b";")[0], 16)):
            return
        yield (await reader.readexactly(size + 2))[:-2]
    while data := await reader.read(1 << 16):
        yield data


async def ask(url: str, key: str, request: dict, answer: Answer) -> Answer:
    """Send it, and fill the answer while its tokens come."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=1 << 20)
    data = json.dumps(request).encode()
    head = f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
    head += f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    answer.asked = time.perf_counter()
    try:
        writer.write(head.encode() + data)
        told = (await reader.readuntil(b"\r\n\r\n")).lower()
        rest, chunked = b"", b"transfer-encoding: chunked" in told
        ok = told.split()[1] == b"200"
        async for data in body(reader, chunked):
            rest += data
            while ok and b"\n\n" in rest:
                event, rest = rest.split(b"\n\n", 1)
                take(event.strip(), answer)
        if not ok:
            raise SystemExit(f"{url}: {told.split()[1].decode()} {rest[:500].decode(errors='replace')}")
    finally:
        writer.close()
    return answer


def take(event: bytes, answer: Answer) -> None:
    """One server-sent event."""
    if not event.startswith(b"data:") or event.endswith(b"[DONE]"):
        return
    found = json.loads(event[5:])
    if "error" in found:
        raise SystemExit(f"the server: {found['error']}")
    if any(choice.get("text") for choice in found.get("choices", ())):
        answer.times.append(time.perf_counter())
    if usage := found.get("usage"):
        answer.n_tokens = usage["completion_tokens"]


async def together(url: str, key: str, words: Words, n: int, args: argparse.Namespace) -> dict[str, float]:
    """n users at once: the figures of one round."""
    begun = time.perf_counter()
    requests = [words.request(args.prompt, args.tokens) for _ in range(n)]
    answers = await asyncio.gather(*(ask(url, key, request, Answer()) for request in requests))
    end = max(answer.times[-1] for answer in answers)
    return {
        "all": sum(answer.n_tokens for answer in answers) / (end - begun),
        "each": statistics.median(answer.rate for answer in answers),
        "first": statistics.median(answer.first for answer in answers),
        "last": max(answer.first for answer in answers),
        "gap": max(max(answer.gaps(), default=0.0) for answer in answers),
    }


async def stalled(url: str, key: str, words: Words, args: argparse.Namespace) -> dict[str, float]:
    """Users who are answered while another one's long prompt is read."""
    users = [Answer() for _ in range(args.stall)]
    asked = [
        asyncio.create_task(ask(url, key, words.request(args.prompt, args.long), answer))
        for answer in users  # more tokens than they will get
    ]
    while any(len(answer.times) < 8 for answer in users):
        await asyncio.sleep(0.01)
        for task in asked:
            if task.done():
                task.result()
    before = [gap for answer in users for gap in answer.gaps()[2:]]
    late = await ask(url, key, words.request(args.long, 1), Answer())
    begin, end = late.asked, late.times[0]
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    # Whoever had no token since then waits still.
    waits = [gap for answer in users for gap in [*answer.gaps(begin, end), end - max(answer.times[-1], begin)]]
    return {
        "before": statistics.median(before),
        "gap": max(waits),
        "median": statistics.median(waits),
        "first": late.first,
        "rate": args.long / late.first,
    }


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--url", action="append", required=True, help="Of a server, without /v1; may be repeated.")
    parser.add_argument("--key", default="none")
    parser.add_argument("--users", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--prompt", type=int, default=64, help="Tokens.")
    parser.add_argument("--tokens", type=int, default=64, help="New ones of each user.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stall", type=int, default=4, help="Users beside the long prompt; 0: leave that out.")
    parser.add_argument("--long", type=int, default=16_000, help="Tokens of the long prompt.")
    args = parser.parse_args()
    words = Words(args.file, 0)
    short = argparse.Namespace(**vars(args) | {"tokens": 8})
    for url in args.url:
        print(f"\n{url}: prompts of {args.prompt} tokens, {args.tokens} new ones\n", flush=True)
        if args.users:
            print("| users | tok/s in all | each | first token, median (last) | largest gap |\n|---|---|---|---|---|")
        for n in args.users:
            asyncio.run(together(url, args.key, words, n, short))
            found = median([asyncio.run(together(url, args.key, words, n, args)) for _ in range(args.rounds)])
            print(
                f"| {n} | {found['all']:.1f} | {found['each']:.1f} | {found['first']:.2f} ({found['last']:.2f}) s | "
                f"{1e3 * found['gap']:.0f} ms |",
                flush=True,
            )
        if args.stall:
            found = asyncio.run(stalled(url, args.key, words, args))
            print(
                f"\n{args.stall} users, then a prompt of {args.long} tokens: largest gap {1e3 * found['gap']:.0f} ms "
                f"(median {1e3 * found['median']:.0f}; before {1e3 * found['before']:.0f}), its first token after "
                f"{found['first']:.1f} s ({found['rate']:.0f} tok/s)",
                flush=True,
            )


if __name__ == "__main__":
    main()
