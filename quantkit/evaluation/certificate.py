"""What certify.json holds: every check of a file for a target, with its outcome and the reason."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

from quantkit import __version__
from quantkit.errors import printable

Status = Literal["pass", "fail", "warn", "skip"]
ORACLE = "oracle "  # before the name of a program, in the name of a check
COLOURS: dict[Status, str] = {"pass": "green", "fail": "red", "warn": "yellow", "skip": "dim"}


@dataclass(frozen=True)
class Check:
    """One outcome. detail: why, in a line."""

    name: str
    status: Status
    detail: str


@dataclass
class Certificate:
    """All checks of one file, in the order in which they ran. files: name -> bytes. weights: `WeightCheck.report`."""

    target: str
    files: dict[str, int]
    checks: list[Check] = field(default_factory=list)
    weights: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether something was checked and nothing failed."""
        return bool(self.checks) and not self.failed()

    @property
    def engine_run(self) -> bool:
        """Whether a program that computes what the target does has run the file, or experts of it."""
        return any(check.name.startswith(ORACLE) and check.status == "pass" for check in self.checks)

    @property
    def verdict(self) -> str:
        """In words: `passed` is said only if a program has run the file."""
        failed = [check.name for check in self.checks if check.status == "fail"]
        if failed or not self.checks:
            return f"failed: {', '.join(failed)}"
        if not self.engine_run:
            return "passed, engine not run"
        left = [c.name for c in self.checks if c.name.startswith(ORACLE) and c.status == "skip"]
        return "passed" + (f", {left[0].removeprefix(ORACLE)} itself not run" if left else "")

    def failed(self, but: str | None = None) -> bool:
        """Whether any check failed, `but` not counted."""
        return any(check.status == "fail" and check.name != but for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """What certify.json holds."""
        out = {
            "passed": self.passed,
            "engine_run": self.engine_run,
            "verdict": self.verdict,
            "target": self.target,
            "quantkit": __version__,
            "files": self.files,
            "checks": [asdict(check) for check in self.checks],
        }
        return out | ({"weights": self.weights} if self.weights else {})

    def table(self) -> Table:
        """For a terminal, a line a check."""
        table = Table("check", "", "reason", title=escape(printable(f"{', '.join(self.files)} for {self.target}")))
        for check in self.checks:
            table.add_row(check.name, f"[{COLOURS[check.status]}]{check.status}[/]", escape(printable(check.detail)))
        return table
