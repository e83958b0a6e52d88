"""What quantkit's server adds to each token: an engine that sleeps for a step in place of one that computes.

    python scripts/bench/served.py FILE [--step 1.9] [--users 1 4 16 64]

FILE gives tokenizer and chat template. Logits are random, of --vocabulary tokens (R1's), and requests are those of
scripts/bench/users.py, which is the client, in a process of its own. Prints its line, and the CPU time that
threads of the server took for each new token: that of the event loop and the scheduler is under one lock (Python's),
samplers are several threads.
"""

import argparse
import dataclasses
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from quantkit.runtime.pauses import launched
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.serving import http
from quantkit.serving.gate import Gate

CLIENT = Path(__file__).parent / "users.py"
SHIFTS = 100_000  # of the logits: each step has others


class Sleeper:
    """`generate.Engine`, but for the computing."""

    def __init__(self, config, n_slots: int, seconds: float):
        self.config, self.n_slots, self.capacity, self.piece = config, n_slots, 4096, 4096
        self.seconds, self.at = seconds, 0
        self.noise = torch.randn(n_slots * config.n_vocab + SHIFTS)

    def prefill(self, slot: int, tokens: list[int], begin: int, each=None) -> torch.Tensor:
        """As `Engine`."""
        return self.decode([slot], tokens)[0]

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`."""
        launched()
        time.sleep(self.seconds)
        self.at = (self.at + 7919) % SHIFTS
        n = self.config.n_vocab
        return self.noise[self.at : self.at + len(slots) * n].view(len(slots), n)


def cpu_seconds() -> Counter[str]:
    """Of threads, those of one pool together."""
    found = Counter[str]()
    for thread in threading.enumerate():
        if thread.ident is not None and thread is not threading.current_thread():
            name = thread.name.rstrip("0123456789").rstrip("_-")
            found[name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--step", type=float, default=1.9, help="Milliseconds.")
    parser.add_argument("--vocabulary", type=int, default=129_280)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=24)
    args = parser.parse_args()
    weights = open_gguf(args.file, n_threads=1)
    config = dataclasses.replace(weights.config, n_vocab=args.vocabulary)
    engine = Sleeper(config, max(args.users), args.step / 1e3)
    api = http.Api("sleeper", weights.file.metadata, weights.tokenizer(), engine, http.Settings(), Gate())
    listener = http.bind("127.0.0.1", 0)
    http.listen(listener)
    server = http.server(api)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="event loop")
    thread.start()
    client = [sys.executable, str(CLIENT), args.file, "--url", f"http://127.0.0.1:{listener.getsockname()[1]}"]
    try:
        for n in args.users:
            before = cpu_seconds()
            command = [*client, "--users", str(n), "--tokens", str(args.tokens), "--prompt", "32", "--stall", "0"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
            made = n * (8 + 3 * args.tokens)  # users.py: one round of 8, three of these
            took = {name: 1e3 * (now - before[name]) / made for name, now in cpu_seconds().items()}
            print(said.splitlines()[-1])
            print("   CPU ms a token:", ", ".join(f"{name} {ms:.2f}" for name, ms in took.items() if ms >= 0.01))
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
