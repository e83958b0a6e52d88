"""What certify.json holds: every check of a file for a target, with its outcome and the reason."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from quantkit import __version__
from quantkit.errors import QuantkitError, printable

Status = Literal["pass", "fail", "warn", "skip"]
ORACLE = "oracle "  # before the name of a program, in the name of a check
COLOURS: dict[Status, str] = {"pass": "green", "fail": "red", "warn": "yellow", "skip": "dim"}


@dataclass(frozen=True)
class Engine:
    """The program that has computed the file, or experts of it. version: of its package or build; cpu: the variant or
    the instruction sets of its kernels; flags: how it was started, each with a space before it, "" for its defaults."""

    program: str
    version: str
    cpu: str
    flags: str = ""

    def __str__(self) -> str:
        """`llama.cpp (xllamacpp 2026.10.11549, AVX2)`."""
        return f"{self.program} ({self.version}, {self.cpu}{self.flags and ','}{self.flags})"


@dataclass(frozen=True)
class Check:
    """One outcome. detail: why, in a line. engine: of a check that ran the file in another program, or was to."""

    name: str
    status: Status
    detail: str
    engine: Engine | None = None


@dataclass
class Certificate:
    """All checks of one file, in the order in which they ran. files: name -> bytes. crc32: name -> CRC-32, where every
    byte was read. weights: `WeightCheck.report`."""

    target: str
    files: dict[str, int]
    checks: list[Check] = field(default_factory=list)
    weights: dict[str, Any] | None = None
    crc32: dict[str, int] | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing failed, and a program that computes what the target does has run the file."""
        return self.engine_run and not self.failed()

    @property
    def engines(self) -> list[Engine]:
        """Programs that have run the file, or experts of each kind in it, and computed what its weights say."""
        in_part = {(c.engine.program, c.engine.version) for c in self.checks if c.engine and c.status == "skip"}
        found = dict.fromkeys(c.engine for c in self.checks if c.engine and c.status == "pass")
        return [engine for engine in found if (engine.program, engine.version) not in in_part]

    @property
    def engine_run(self) -> bool:
        """Whether there is one. `transformers` is none: it reads the original's config.json, and no file."""
        return bool(self.engines)

    @property
    def not_run(self) -> list[str]:
        """Checks that were left out."""
        return [check.name for check in self.checks if check.status == "skip"]

    @property
    def verdict(self) -> str:
        """In words: `passed in` stands before the programs that have run the file, and before nothing else."""
        failed = [check.name for check in self.checks if check.status == "fail"]
        if failed or not self.checks:
            return f"failed: {', '.join(failed)}"
        if not self.engine_run:
            others = [check.engine for check in self.checks if check.engine and check.status == "warn"]
            return f"not passed: {others[0]} computes another model" if others else "nothing failed, engine not run"
        left = f"; not run: {', '.join(name.removeprefix(ORACLE) for name in self.not_run)}" if self.not_run else ""
        return f"passed in {', '.join(map(str, self.engines))}{left}"

    def failed(self, but: str | None = None) -> bool:
        """Whether any check failed, or there was none; `but` not counted."""
        return not self.checks or any(check.status == "fail" and check.name != but for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """What certify.json holds."""
        out = {
            "passed": self.passed,
            "engine_run": self.engine_run,
            "verdict": self.verdict,
            "target": self.target,
            "quantkit": __version__,
            "engines": [asdict(engine) for engine in self.engines],
            "not_run": self.not_run,
            "files": self.files,
            "crc32": self.crc32,
            "checks": [asdict(check) for check in self.checks],
        }
        return out | ({"weights": self.weights} if self.weights else {})

    def table(self) -> Table:
        """For a terminal, a line a check."""
        table = Table("check", "", "reason", title=escape(printable(f"{', '.join(self.files)} for {self.target}")))
        for check in self.checks:
            table.add_row(check.name, f"[{COLOURS[check.status]}]{check.status}[/]", escape(printable(check.detail)))
        return table


def failures(known: Mapping[str, Any]) -> list[str]:
    """Names of the checks that failed, of a certify.json that was read; QuantkitError if it holds no list of checks."""
    checks = known.get("checks", [])
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise QuantkitError("certify.json is damaged: checks is no list of objects; run `quantkit certify` again")
    return [str(check.get("name", "")) for check in checks if check.get("status") == "fail"]
