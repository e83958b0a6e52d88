"""Total decode speed of 1, 5 and 20 concurrent sequences, through the HTTP server and the openai client.

    python scripts/bench/serve.py FILE [--threads 1] [--tokens 100] [--users 1 5 20]

Every sequence has its own 64-token prompt; greedy. The reply to each is compared with what it gets alone. Prints
total new tokens per second, from the first request to the last reply (prompts included), best of `--repeat`.
"""

import argparse
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import torch

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.serving import http
from quantkit.serving.gate import Gate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 5, 20])
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    weights = open_gguf(args.file, n_threads=args.threads)
    engine = open_engine(weights, max(args.users), 512)
    api = http.Api("bench", weights.file.metadata, weights.tokenizer(), engine, http.Settings(), Gate())
    listener = http.bind("127.0.0.1", 0)
    http.listen(listener)
    server = http.server(api)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key="none", timeout=600)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(300, weights.config.n_vocab - 100, (max(args.users), 64), generator=generator)
    prompts[:, 0] = weights.config.bos

    def ask(i: int) -> tuple[str, int]:
        answer = client.completions.create(
            model="bench",
            prompt=prompts[i].tolist(),
            max_tokens=args.tokens,
            temperature=0,
            extra_body={"cache_prompt": False},
        )
        return answer.choices[0].text, answer.usage.completion_tokens

    try:
        alone = [ask(i)[0] for i in range(max(args.users))]
        for users in args.users:
            speeds, same = [], True
            for _ in range(args.repeat):
                start = time.perf_counter()
                with ThreadPoolExecutor(users) as pool:
                    answers = list(pool.map(ask, range(users)))
                speeds.append(sum(n for _, n in answers) / (time.perf_counter() - start))
                same &= [text for text, _ in answers] == alone[:users]
            print(
                f"{users:3} sequences: {max(speeds):8.1f} tok/s in all, {max(speeds) / users:7.1f} each, "
                f"outputs {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
