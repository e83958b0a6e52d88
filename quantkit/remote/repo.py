"""A model on a Hub as a Checkpoint: its name, its commit, its small files, and the listing of its shards."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants, try_to_load_from_cache

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import MOST, FolderSource, Kind, read_text, read_whole
from quantkit.formats.checkpoint import INDEX, SHARD, Checkpoint, Needed, own_shards
from quantkit.formats.model_names import PART, REPO_ID
from quantkit.remote.cache import Store, failed, home_of, keep, matches
from quantkit.remote.client import RangeReader, Repo, model_info, with_retry
from quantkit.remote.source import HubSource

SMALL_FILES = (
    INDEX,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",  # of models that have no tokenizer.json, to say so
    "tiktoken.model",
)
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")


@dataclass(frozen=True)
class Listing:
    """A repository's files at one commit: name -> (ETag, bytes)."""

    id: str
    commit: str
    files: dict[str, tuple[str, int]]
    license: str | None = None


def parse(model: str) -> Repo | None:
    """The repository that a name means, None if it is none: `user/name`, `user/name@revision`, or an address."""
    if match := REPO_ID.fullmatch(model.removeprefix(constants.HF_PROTOCOL).removeprefix("models/")):
        return Repo(match[1], constants.ENDPOINT, match[2])
    parts = urlsplit(model)
    match = re.fullmatch(rf"/({PART}/{PART})(?:/(?:tree|resolve|blob)/([^/]+).*)?/?", parts.path)
    if parts.scheme in ("http", "https") and parts.hostname and match:
        host = parts.netloc.rpartition("@")[2]
        endpoint = "https://huggingface.co" if host == "hf.co" else f"{parts.scheme}://{host}"
        return Repo(match[1], endpoint, unquote(match[2]) if match[2] else None)
    return None


def open_remote(repo: Repo, cache_bytes: int, needed: Needed | None = None) -> Checkpoint:
    """Config, index and all shard headers of a Hub model; weights come when they are read.

    The commit is looked up once and everything is read at it. QuantkitError in one line for whatever goes wrong.
    """
    home = home_of(repo.endpoint)
    store = Store(home, cache_bytes)
    listing = list_files(repo, home)
    store.find(f"models/{repo.id.replace('/', '--')}/{listing.commit}/listing.json", lambda _: True)
    repo = replace(repo, commit=listing.commit)
    name = repo.id.rsplit("/", 1)[1]
    folder = home / "models" / repo.id.replace("/", "--") / listing.commit / name
    for file in [*SMALL_FILES, *filter(MORE_TEMPLATES.fullmatch, sorted(listing.files))]:
        if file in listing.files:
            link(folder / file, download(repo, file, listing, store))
    shards = sorted(file for file in listing.files if file.endswith(SHARD) and "/" not in file)
    if INDEX in listing.files:
        shards = sorted(set(shards) & indexed(folder / INDEX))
    else:
        shards = own_shards(shards, str(repo))
    source = HubSource(repo, listing.files, store, downloaded_shards(repo, listing, shards))
    source.load_headers(shards)
    checkpoint = Checkpoint.open(folder, source, needed)
    shard_facts = json.dumps([(shard, *listing.files[shard]) for shard in shards])
    checkpoint.origin = {
        "repo": repo.id,
        "commit": listing.commit,
        "weights": hashlib.sha256(shard_facts.encode()).hexdigest(),
    }
    if listing.license:
        checkpoint.origin["license"] = listing.license
    return checkpoint


def list_files(repo: Repo, home: Path) -> Listing:
    """Files with sizes and ETags at the wanted revision; without a network the listing of an earlier look."""
    known = home / "models" / repo.id.replace("/", "--")
    reference = known / f"{(repo.revision or 'main').replace('/', '%2F')}.ref"
    try:
        info = with_retry(partial(model_info, repo), repo, "its listing")
    except QuantkitError:
        if constants.is_offline_mode() and reference.exists():
            return _load(known / read_text(reference, "record") / "listing.json")
        if constants.is_offline_mode() and (found := listing_of_snapshot(repo)):
            return found
        raise
    files = {}
    for sibling in info.siblings or ():
        etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        if etag and sibling.size is not None and re.fullmatch(r"[0-9a-f]{16,64}", etag):
            files[sibling.rfilename] = (etag, sibling.size)
    if not info.sha or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
        raise QuantkitError(f"{repo} at {repo.endpoint}: the listing names no commit")
    if "config.json" not in files:
        raise QuantkitError(f"{repo} at {repo.endpoint}: no config.json there; not a checkpoint in safetensors")
    license_name = info.card_data.get("license") if info.card_data else None
    listing = Listing(repo.id, info.sha, files, license_name if isinstance(license_name, str) else None)
    keep(known / info.sha / "listing.json", json.dumps(asdict(listing)).encode())
    keep(reference, info.sha.encode())
    return listing


def listing_of_snapshot(repo: Repo) -> Listing | None:
    """What `hf download` left in huggingface_hub's cache, where files are links to blobs named by their ETags; None if
    there is nothing, or no links. Whether it is whole shows when it is read."""
    if not repo.trusted:  # that cache is the configured endpoint's
        return None
    config = try_to_load_from_cache(repo.id, "config.json", revision=repo.revision or "main")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    links = [path for path in folder.rglob("*") if path.is_symlink() and path.exists()]
    files = {str(path.relative_to(folder)): (path.resolve().name, path.stat().st_size) for path in links}
    right = all(re.fullmatch(r"[0-9a-f]{16,64}", etag) for etag, _ in files.values())
    return Listing(repo.id, folder.name, files) if right and "config.json" in files else None


def _load(path: Path) -> Listing:
    try:
        value: dict[str, Any] = json.loads(read_text(path, "record"))
        files = {name: (etag, size) for name, (etag, size) in value["files"].items()}
        return Listing(value["id"], value["commit"], files, value["license"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantkitError(f"{path}: {error}; go online once to fetch it again") from None


def download(repo: Repo, file: str, listing: Listing, store: Store) -> Path:
    """A small file: what huggingface_hub's cache or our own has, if it is what the ETag names, else from the Hub.

    QuantkitError for one that is larger than its kind ever is, or that is not what its ETag names.
    """
    (etag, size), where = listing.files[file], f"{repo} at {repo.endpoint}: {file}"
    kind: Kind = "index" if file == INDEX else "tokenizer" if file.startswith("tokenizer") else "config"
    if size > MOST[kind]:
        raise QuantkitError(f"{where} has {size:,} bytes; no {kind} file has so many")
    found = try_to_load_from_cache(repo.id, file, revision=repo.commit) if repo.trusted else None
    if isinstance(found, str) and os.path.getsize(found) == size and matches(read_whole(Path(found), kind), etag):
        return Path(found)
    name = f"small/{etag}"
    if store.find(name, lambda data: len(data) == size and matches(data, etag)) is not None:
        return store.folder / name
    data = bytearray()
    RangeReader(repo, {file: (etag, size)}).fetch(file, 0, size, data.extend, "all of it")
    if not matches(bytes(data), etag):
        raise QuantkitError(f"{where} is not what its ETag {etag} names; it was changed on its way, or the server lies")
    return store.put(name, bytes(data))


def link(path: Path, target: Path) -> None:
    """path -> target, so that the model lies in a folder of its own name."""
    if path.is_symlink() and os.readlink(path) == str(target):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.symlink_to(target)
        os.replace(part, path)
    except OSError as error:
        raise failed(path.parent, error) from None


def indexed(path: Path) -> set[str]:
    """Shards that an index names; a broken index is left to `Checkpoint.open`, which says what is wrong."""
    try:
        return set(map(str, json.loads(read_whole(path, "index"))["weight_map"].values()))
    except (QuantkitError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def downloaded_shards(repo: Repo, listing: Listing, shards: list[str]) -> FolderSource | None:
    """The snapshot in huggingface_hub's cache, if someone downloaded the whole model with other tools."""
    if not repo.trusted:
        return None
    cached = [try_to_load_from_cache(repo.id, shard, revision=repo.commit) for shard in shards]
    found = [path for path in cached if isinstance(path, str)]
    if not shards or len(found) != len(shards):
        return None
    right = [os.path.getsize(path) for path in found] == [listing.files[shard][1] for shard in shards]
    return FolderSource(Path(found[0]).parent) if right else None
