"""Instructions of the compiled products for a superblock of 256 weights and one token, by type, for any x86 processor.

    python scripts/bench/instructions.py [--march sapphirerapids] [--define GATHER=1]

Counted in the innermost loops of the library as it is compiled for this machine, or for another one and with what is
defined, without what writes indices ahead. With llvm-mca on PATH and --march also the cycles that it predicts of a core
alone, and the least that its busiest unit allows (two hyperthreads together).
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from quantkit.runtime.native import compiler

JUMP = re.compile(r"j\w+\s+([0-9a-f]+)")
PADDING = re.compile(r"(data16|nop|cs nop|xchg +%ax)")


def loops(library: Path, function: str) -> list[list[str]]:
    """Innermost loops that ask for weights, as assembly."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library], capture_output=True, text=True, check=True)
    body = re.search(rf"^[0-9a-f]+ <{function}>:\n(.*?)\n\n", text.stdout, re.S | re.M)
    if body is None:
        return []
    lines = [line.partition(":") for line in body[1].splitlines()]
    code = [(int(address.strip(), 16), text.strip()) for address, _, text in lines if text.strip()]
    place = {address: i for i, (address, _) in enumerate(code)}
    back = [(place.get(int(m[1], 16), len(code)), i) for i, (_, t) in enumerate(code) if (m := JUMP.match(t))]
    spans = [(begin, end) for begin, end in back if begin <= end]
    inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    found = [[t for _, t in code[begin : end + 1] if not PADDING.match(t)] for begin, end in inner]
    return [loop for loop in found if any("prefetch" in t for t in loop)]


def predicted(loop: list[str], march: str) -> str:
    """Cycles by llvm-mca, in words."""
    text = "\n".join(re.sub(r"#.*|<.*?>", "", t) for t in loop if not JUMP.match(t))
    command = ["llvm-mca", f"-mcpu={march}", "-iterations=200"]
    said = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    cycles, least = (re.search(rf"{key}:\s+([\d.]+)", said) for key in ("Total Cycles", "Block RThroughput"))
    assert cycles and least
    return f", {int(cycles[1]) / 200:.0f} cycles, {float(least[1]):.0f} at least"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--march", default="native")
    parser.add_argument("--define", action="append", default=[], help="GATHER=1, REGISTERS=1024: see compiler.py")
    args = parser.parse_args()
    flags = list(compiler.flags())
    if args.march != "native":
        flags = [f"-march={args.march}" if flag == compiler.NATIVE else flag for flag in compiler.FLAGS]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "experts.so"
        files = ["-o", str(library), str(compiler.SOURCES / compiler.MAIN), *compiler.LIBRARIES]
        subprocess.run(["cc", *flags, *(f"-D{value}" for value in args.define), *files], check=True)
        for qtype in "iq1_s iq1_m iq2_xxs iq2_xs iq2_s q2_k q3_k q4_k q5_k q6_k".split():
            for loop in sorted(loops(library, f"dot_{qtype}"), key=len)[:1]:  # that of one token
                cycles = predicted(loop, args.march) if args.march != "native" and shutil.which("llvm-mca") else ""
                print(f"{qtype.upper():8} {len(loop):3} instructions{cycles}", flush=True)


if __name__ == "__main__":
    main()
