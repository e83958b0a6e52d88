"""The program that tries a JSON schema, as a process of its own: some take llguidance minutes and gigabytes before it
counts its first step (a `multipleOf` of nine digits, an `allOf` of twenty patterns). It imports nothing of quantkit.

Standard input: JSON of {"schema", "space", "states"}, as `serving/grammar.py` has them. Exit code 0: whoever makes this
grammar need not wait, be it right or wrong. A signal: it exceeds a limit.
"""

import contextlib
import json
import os
import resource
import sys

MEMORY = 128 << 20  # bytes beyond what the program itself takes
SECONDS = 1  # of CPU time


def main() -> None:
    """Try it; Rust ends the process where memory ends."""
    import llguidance

    asked = json.load(sys.stdin)
    vocabulary = llguidance.LLTokenizer("byte")
    limits = llguidance.LLParserLimits(max_lexer_states=asked["states"], verbose_errors=False)
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    used = resource.getrusage(resource.RUSAGE_SELF)
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, own + MEMORY),
        (resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + SECONDS),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    with contextlib.suppress(ValueError):
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            asked["schema"], overrides={"whitespace_pattern": asked["space"]}
        )
        matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()


if __name__ == "__main__":
    main()
