"""Upload: each large file by itself, so that a break costs at most one, then one commit with the card."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import MOST, read_whole
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.safetensors_header import load_object
from quantkit.job.folder import PLAN, PROVENANCE, VERIFY
from quantkit.job.publish.card import Row, layer_plot, render_card
from quantkit.job.publish.folder import NAME, Quant, reproduce
from quantkit.job.publish.others import figures, made
from quantkit.job.publish.secrets import refuse_secrets
from quantkit.models import family
from quantkit.planning.targets import start_flags
from quantkit.progress import say
from quantkit.remote.client import Repo, with_retry

CARD = "README.md"
CONFLICTS = 3  # others may commit while we upload
CONFLICT_STATUS = (409, 412)
BASE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9_][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class Destination:
    """Where to: private and create decide only when the repository is new; pr opens a pull request."""

    repo: str
    private: bool = False
    pr: bool = False


@dataclass(frozen=True)
class Present:
    """What a repository holds already. files: path -> bytes."""

    commit: str | None
    files: Mapping[str, int]


class Uploader:
    """One publication. base, license_name: None to take what `make` recorded about the source."""

    def __init__(self, quant: Quant, to: Destination, base: str | None = None, license_name: str | None = None) -> None:
        self.quant, self.to = quant, to
        source = quant.provenance.get("source") or {}
        self.base, self.license = base or source.get("repo"), license_name or source.get("license")
        if not self.base:
            raise QuantkitError(f"{quant.folder}: made from a local folder; name its origin (--base-model user/name)")
        if not BASE.fullmatch(str(self.base)):
            raise QuantkitError("--base-model: give the id of a model on the Hub, user/name")
        self.api = HfApi(library_name="quantkit")
        self.repo = Repo(to.repo, constants.ENDPOINT)
        self.plot = layer_plot(quant.plan)

    def present(self) -> Present:
        """The repository as it is; nothing if there is none yet."""

        def look() -> Present:
            try:
                info = self.api.model_info(self.to.repo, files_metadata=True, timeout=30)
            except RepositoryNotFoundError:
                return Present(None, {})
            return Present(info.sha, {each.rfilename: each.size or 0 for each in info.siblings or ()})

        return with_retry(look, self.repo, "its listing")

    def rows(self, present: Present) -> list[Row]:
        """This quantization and those that are there, by size."""
        quant = self.quant
        sizes = {path: local.stat().st_size for path, local in quant.files.items()}
        sizes[f"{quant.name}/layers.png"] = len(self.plot)
        rows = [self._row(quant.name, sizes, quant.verify, quant.provenance)]
        folders = {path.removesuffix(f"/{PLAN}") for path in present.files if path.endswith(f"/{PLAN}")}
        for name in sorted(folders - {quant.name}):
            if not NAME.fullmatch(name):
                say(f"{self.repo}: not listed on the card, its name is unusual: {name!r}")
                continue
            known = [self._remote_json(f"{name}/{each}", present) for each in (VERIFY, PROVENANCE)]
            rows.append(self._row(name, present.files, *known))
        return sorted((row for row in rows if row.gguf), key=lambda row: row.verify.get("bytes", 0))

    def _row(self, name: str, files: Mapping[str, int], verify: Mapping[str, Any], how: Mapping[str, Any]) -> Row:
        facts = made(how)
        commands = reproduce(facts, str(self.base), name, self.to.repo)
        return Row(name, files, figures(verify), facts, commands)

    def _remote_json(self, path: str, present: Present) -> dict[str, Any]:
        where = f"{self.repo}/{path}"
        if path not in present.files:
            return {}
        if present.files[path] > MOST["record"]:
            say(f"{where} has {present.files[path]:,} bytes; the card lists {path.split('/')[0]} without it")
            return {}
        get = partial(self.api.hf_hub_download, self.to.repo, path, revision=present.commit)
        local = Path(with_retry(get, self.repo, path))
        try:
            return load_object(read_whole(local, "record"), where)
        except QuantkitError as error:
            say(f"{error}; the card lists {path.split('/')[0]} without it")
            return {}

    def card(self, present: Present) -> str:
        """README.md as it will be: of this quantization and those that are there. QuantkitError if it holds a token."""
        flags = start_flags("llama.cpp", family.from_gguf(GGUFFile.open(self.quant.gguf[0]).metadata))
        text = render_card(self.to.repo, self.quant.plan.model, str(self.base), self.license, self.rows(present), flags)
        ModelCard(text)  # parses the head
        refuse_secrets(CARD, text.encode())
        return text

    def run(self) -> str:
        """Create the repository if need be, upload, commit; returns the address of the commit or pull request."""
        with quiet():
            with_retry(self.api.whoami, self.repo, "your account")
            if not self.to.pr:
                create = partial(self.api.create_repo, self.to.repo, private=self.to.private, exist_ok=True)
                with_retry(create, self.repo, "the new repository")
            cleaned = self.quant.cleaned
            additions = [
                CommitOperationAdd(path, cleaned.get(path) or str(local)) for path, local in self.quant.files.items()
            ]
            additions.append(CommitOperationAdd(f"{self.quant.name}/layers.png", self.plot))
            for number, addition in enumerate(additions, 1):
                size = addition.upload_info.size
                say(f"{number} of {len(additions)}: {addition.path_in_repo} ({size:,} bytes)")
                send = partial(
                    self.api.preupload_lfs_files,
                    self.to.repo,
                    [addition],
                    create_pr=self.to.pr,
                    free_memory=False,
                )
                with_retry(send, self.repo, addition.path_in_repo)
            return self._commit(additions)

    def _commit(self, additions: Sequence[CommitOperationAdd]) -> str:
        """The card lists what is there at the parent commit; if someone commits in between, it is written anew."""
        for attempt in range(CONFLICTS):
            present = self.present()
            card = CommitOperationAdd(CARD, self.card(present).encode())
            ours = {CARD, *(addition.path_in_repo for addition in additions)}
            # Parts of an earlier upload under this name would be taken for parts of this one.
            stale = [
                CommitOperationDelete(path)
                for path in present.files
                if path.startswith(f"{self.quant.name}/") and path not in ours
            ]
            commit = partial(
                self.api.create_commit,
                self.to.repo,
                [*additions, card, *stale],
                create_pr=self.to.pr,
                commit_message=f"{self.quant.plan.model} {self.quant.name}, made by quantkit",
                parent_commit=present.commit,
            )
            try:
                done = with_retry(partial(_unless_conflict, commit), self.repo, "the commit")
                return done.pr_url or done.commit_url
            except Conflict:
                say(f"{self.repo} changed while this was uploaded; writing the card anew ({attempt + 1})")
        raise QuantkitError(f"{self.repo}: keeps changing; run the same command again (nothing is sent twice)")


class Conflict(QuantkitError):
    """Someone else committed."""


def _unless_conflict(commit: Callable[[], CommitInfo]) -> CommitInfo:
    try:
        return commit()
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in CONFLICT_STATUS:
            raise Conflict("someone else committed") from None
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """huggingface_hub warns of each retry with the address it asked, signature included; its bars are for terminals."""
    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars and not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
