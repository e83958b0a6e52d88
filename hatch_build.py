"""What the package says of itself that pyproject.toml cannot: URLs, and a README whose links lead somewhere from a page
that does not lie in the repository."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")


def urls(home: str) -> dict[str, str]:
    """By the names that PyPI knows. home: of the repository; none: none."""
    if not home:
        return {}
    places = {"Documentation": "tree/main/docs", "Changelog": "blob/main/CHANGELOG.md", "Issues": "issues"}
    return {"Homepage": home, "Source": home} | {name: f"{home}/{path}" for name, path in places.items()}


def absolute(readme: str, home: str, version: str) -> str:
    """The README with links to the files of this version."""
    return RELATIVE.sub(rf"]({home}/blob/v{version}/\1)", readme) if home else readme


class Metadata(MetadataHookInterface):
    """Hatch asks it whenever it builds."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Fill in what is dynamic in pyproject.toml."""
        root, home = Path(self.root), str(self.config.get("home", "")).rstrip("/")
        found = re.search(r'__version__ = "(.+)"', (root / "quantkit" / "__init__.py").read_text(encoding="utf-8"))
        assert found, "quantkit/__init__.py: no __version__"
        text = absolute((root / "README.md").read_text(encoding="utf-8"), home, found[1])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(home)
