"""A Hugging Face Hub on 127.0.0.1 for the unmodified huggingface_hub client, with a second port as its object store.

It speaks the parts of the protocol that quantkit's two directions use: model info, tree, revision, resolve (HEAD and
GET with Range, ETag, X-Linked-Etag, redirect of LFS files to a signed address on the other port), create,
validate-yaml, preupload, LFS batch with basic and multipart transfer and dedupe, commit, pull requests. Trouble is
injected by `faults`; what was asked for is in `log`, the bytes of files that were sent in `sent`.
"""

import base64
import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

PART_BYTES = 1 << 20  # LFS files beyond this are uploaded in parts
LFS_FROM = 64 << 10  # larger or binary files are LFS
TOKEN = "hf_" + "loopbackToken" * 2
BLOCK = 1 << 16


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Blob:
    """Content of one file: bytes, or something with `size` and `read(begin, end)` that needs no memory."""

    def __init__(self, data: "bytes | Path | Sparse", lfs: bool):
        self.data, self.lfs = data, lfs
        if isinstance(data, Path):
            self.size = data.stat().st_size
            raw = data.read_bytes()
        else:
            self.size = len(data) if isinstance(data, bytes) else data.size
            raw = data if isinstance(data, bytes) else data.identity
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.oid = git_oid(raw)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def read(self, begin: int, end: int) -> bytes:
        if isinstance(self.data, bytes):
            return self.data[begin:end]
        if isinstance(self.data, Path):
            with self.data.open("rb") as file:
                file.seek(begin)
                return file.read(end - begin)
        return self.data.read(begin, end)


class Sparse:
    """A shard of which only the header exists; the rest reads as zeros."""

    def __init__(self, header: bytes, size: int):
        self.header, self.size = header, size
        self.identity = header + str(size).encode()

    def read(self, begin: int, end: int) -> bytes:
        head = self.header[begin:end]
        return head + bytes(end - begin - len(head))


@dataclass
class Model:
    commits: list[dict[str, Blob]] = field(default_factory=lambda: [{}])
    private: bool = False
    gated: bool = False
    pulls: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def sha(self, index: int = -1) -> str:
        index = index % len(self.commits)
        facts = json.dumps([index, sorted((name, blob.sha256) for name, blob in self.commits[index].items())])
        return hashlib.sha1(facts.encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        if revision == "main":
            return self.sha(), self.commits[-1]
        if revision in self.pulls:
            return hashlib.sha1(revision.encode()).hexdigest(), self.pulls[revision]
        for index in range(len(self.commits)):
            if self.sha(index) == revision:
                return revision, self.commits[index]
        return None


class Drop(Exception):
    """Break the connection here."""


class Hub:
    """The server. url: for HF_ENDPOINT. `with Hub() as hub: hub.add("user/name", files)`."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.objects: dict[str, bytes] = {}  # LFS store, by sha256
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.log: list[tuple[str, str]] = []
        self.sent: Counter[str] = Counter()  # bytes of bodies, by file
        self.ranges: dict[str, list[tuple[int, int]]] = {}  # bytes that really left, by file
        self.stored = 0  # bytes of LFS content that arrived
        self.faults: list[Callable[[str, str], tuple[int, dict[str, str]] | None]] = []
        self.cut: Callable[[str, int, int], int | None] = lambda *_: None  # (file, begin, end) -> byte to break off at
        self.shorten: Callable[[str], bool] = lambda _: False
        self.signature = "1"
        self.lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, store)) for store in (False, True)]
        for server in self._servers:
            server.daemon_threads = True
            server.handle_error = lambda *_: None  # a client that was killed
        self.url, self.store = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> "Hub":
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, files: dict[str, bytes | Path | Sparse], **options: bool) -> Model:
        model = Model([{name: self.blob(name, data) for name, data in files.items()}], **options)
        self.models[repo] = model
        return model

    def blob(self, name: str, data: bytes | Path | Sparse) -> Blob:
        return Blob(data, name.endswith((".safetensors", ".gguf")))

    def reset(self) -> None:
        with self.lock:
            self.log.clear()
            self.sent.clear()
            self.ranges.clear()
            self.stored = 0

    @contextlib.contextmanager
    def fault(self, match: str, status: int, times: int = 1 << 30, **headers: str) -> Iterator[None]:
        """Answer requests whose "METHOD path" contains `match` with this status, so many times."""
        left = [times]

        def rule(method: str, path: str) -> tuple[int, dict[str, str]] | None:
            if match in f"{method} {path}" and left[0] > 0:
                left[0] -= 1
                return status, {key.replace("_", "-"): value for key, value in headers.items()}
            return None

        self.faults.append(rule)
        try:
            yield
        finally:
            self.faults.remove(rule)

    def drop_randomly(self, times: int, seed: int = 0) -> Counter[str]:
        """Break `times` downloads of weights at a random byte; returns a live count."""
        chance, count = random.Random(seed), Counter[str]()

        def cut(file: str, begin: int, end: int) -> int | None:
            with self.lock:
                if count["dropped"] < times and end - begin > 1 and chance.random() < 0.8:
                    count["dropped"] += 1
                    return chance.randrange(begin, end)
            return None

        self.cut = cut
        return count


def _handler(hub: Hub, is_store: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub, Handler.is_store = hub, is_store
    return Handler


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub
    is_store: bool

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.serve()

    do_GET = do_POST = do_PUT = do_HEAD

    def serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = b"".join(iter(self.chunk, b""))
        else:
            self.body = self.rfile.read(length)
        parts = urlsplit(self.path)
        path, self.query = unquote(parts.path), parse_qs(parts.query)
        with self.hub.lock:
            self.hub.log.append((self.command, path))
        for rule in list(self.hub.faults):
            if found := rule(self.command, path):
                status, headers = found
                if status == 0:
                    return self.hang_up()
                return self.reply(status, {"error": "injected"}, headers)
        try:
            (self.object_store if self.is_store else self.route)(path)
        except (Drop, ConnectionError):
            self.hang_up()

    def chunk(self) -> bytes:
        size = int(self.rfile.readline().strip(), 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def hang_up(self) -> None:
        """Reset, as a crashed peer does."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def reply(self, status: int, value: object = None, headers: dict[str, str] | None = None) -> None:
        body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str, message: str = "no") -> None:
        self.reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    # The Hub.

    def route(self, path: str) -> None:
        if path == "/api/whoami-v2":
            if not self.authorised():
                return self.fail(401, "", "Invalid credentials in Authorization header")
            return self.reply(200, {"type": "user", "name": "user", "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            ok = json.loads(self.body)["content"].startswith("---\n")
            return self.reply(200 if ok else 400, {"errors": [] if ok else [{"message": "no YAML"}], "warnings": []})
        if path == "/api/repos/create":
            return self.create()
        if path.startswith("/lfs/"):
            return self.lfs_answers(path)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch(path.removeprefix("/").removesuffix(".git/info/lfs/objects/batch"))
        words = path.removeprefix("/api").removeprefix("/models").removeprefix("/").split("/")
        n_words = 3 if words[0] == "datasets" else 2
        repo, rest = "/".join(words[:n_words]), words[n_words:]
        model = self.hub.models.get(repo)
        if model is None or (model.private and not self.authorised()):
            return self.fail(401 if not self.authorised() else 404, "RepoNotFound", "Repository not found")
        if not path.startswith("/api/"):
            if model.gated and not self.authorised():
                return self.fail(401, "GatedRepo", "Access to this model is restricted")
            return self.resolve(repo, model, rest)
        if self.command == "POST":
            if not self.authorised() and rest[0] != "paths-info":
                return self.fail(401, "", "Invalid credentials in Authorization header")
            what, revision = rest[0], "/".join(rest[1:])
            if what == "paths-info":
                return self.paths_info(model, revision)
            return {"preupload": self.preupload, "commit": self.commit}[what](repo, model, revision)
        if not rest or rest[0] == "revision":
            return self.info(repo, model, "/".join(rest[1:]) or "main")
        if rest[0] == "tree":
            return self.tree(model, rest[1])
        return self.fail(404, "EntryNotFound")

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def create(self) -> None:
        if not self.authorised():
            return self.fail(401, "", "Invalid credentials in Authorization header")
        asked = json.loads(self.body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        if not repo.startswith("user/"):
            return self.fail(403, "", "You don't have the rights to create a model under this namespace")
        exists = repo in self.hub.models
        if not exists:
            self.hub.models[repo] = Model(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def info(self, repo: str, model: Model, revision: str) -> None:
        found = model.at(revision)
        if found is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        sha, files = found
        siblings = []
        for name, blob in files.items():
            entry = {"rfilename": name, "size": blob.size, "blobId": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 130}
            siblings.append(entry)
        about = {"_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": model.private, "gated": model.gated}
        about |= {"siblings": siblings, "tags": [], "cardData": {"license": "mit"}}
        return self.reply(200, about)

    def tree(self, model: Model, revision: str) -> None:
        found = model.at(revision)
        if found is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        return self.reply(200, [self.entry(name, blob) for name, blob in found[1].items()])

    def paths_info(self, model: Model, revision: str) -> None:
        asked = parse_qs(self.body.decode())["paths"] if self.body[:1] != b"{" else json.loads(self.body)["paths"]
        found = model.at(revision)
        files = found[1] if found else {}
        return self.reply(200, [self.entry(name, files[name]) for name in asked if name in files])

    def entry(self, name: str, blob: Blob) -> dict:
        entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.oid}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
        return entry

    def resolve(self, repo: str, model: Model, rest: list[str]) -> None:
        revision, name = rest[1], "/".join(rest[2:])
        found = model.at(revision)
        if rest[0] != "resolve" or found is None:
            return self.fail(404, "RevisionNotFound", "Invalid rev id")
        sha, files = found
        if name not in files:
            return self.fail(404, "EntryNotFound", "Entry not found")
        blob = files[name]
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if not blob.lfs:
            return self.content(name, blob, headers | {"ETag": f'"{blob.oid}"'})
        target = f"{self.hub.store}/{quote(repo)}/{revision}/{quote(name)}?signature={self.hub.signature}"
        linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Location": target}
        return self.reply(302, b"", headers | linked)

    def content(self, name: str, blob: Blob, headers: dict[str, str]) -> None:
        begin, end, status = 0, blob.size, 200
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            begin, end, status = int(first), min(blob.size, int(last) + 1 if last else blob.size), 206
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{blob.size}"}
        if self.hub.shorten(name) and end - begin > 1:
            end -= (end - begin) // 2
            headers |= {"Content-Range": f"bytes {begin}-{end - 1}/{blob.size}"}
        self.send_response(status)
        for key, text in (headers | {"Content-Length": str(end - begin)}).items():
            self.send_header(key, text)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = self.hub.cut(name, begin, end)
        last, sent = end if stop is None else stop, begin
        try:
            while sent < last:
                data = blob.read(sent, min(last, sent + BLOCK))
                self.wfile.write(data)
                sent += len(data)
        finally:
            with self.hub.lock:
                self.hub.sent[name] += sent - begin
                self.hub.ranges.setdefault(name, []).append((begin, sent))
        if stop is not None:
            raise Drop

    def preupload(self, repo: str, model: Model, revision: str) -> None:
        _, files = model.at(unquote(revision))
        answers = []
        for file in json.loads(self.body)["files"]:
            sample = base64.b64decode(file["sample"])
            lfs = file["size"] > LFS_FROM or b"\0" in sample
            have = files.get(file["path"])
            oid = None if have is None else have.etag
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.reply(200, {"files": answers})

    def commit(self, repo: str, model: Model, revision: str) -> None:
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        head = next(line["value"] for line in lines if line["key"] == "header")
        if head.get("parentCommit") not in (None, model.sha()):
            return self.fail(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(model.commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.fail(400, "", f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = Blob(self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        model.messages.append(head["summary"])
        pull = None
        if self.query.get("create_pr") == ["1"]:
            number = len(model.pulls) + 1
            model.pulls[f"refs/pr/{number}"] = files
            pull = f"{self.hub.url}/{repo}/discussions/{number}"
        else:
            model.commits.append(files)
        oid = model.sha()
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        return self.reply(200, answer | {"pullRequestUrl": pull})

    def lfs_batch(self, repo: str) -> None:
        if not self.authorised():
            return self.fail(401, "", "Invalid credentials in Authorization header")
        objects = []
        for item in json.loads(self.body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                base = f"{self.hub.store}/upload/{item['oid']}"
                upload: dict = {"href": f"{base}/0?signature=1"}
                if item["size"] > PART_BYTES:
                    n_parts = -(-item["size"] // PART_BYTES)
                    parts = {f"{i + 1:05}": f"{base}/{i + 1}?signature=1" for i in range(n_parts)}
                    upload = {"href": f"{self.hub.url}/lfs/complete/{item['oid']}"}
                    upload["header"] = {"chunk_size": str(PART_BYTES)} | parts
                verify = {"href": f"{self.hub.url}/lfs/verify/{item['oid']}"}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return self.reply(200, {"transfer": "multipart", "objects": objects})

    def lfs_answers(self, path: str) -> None:
        _, _, what, oid = path.split("/")
        if what == "complete":
            parts = self.hub.uploads.pop(oid, {})
            wanted = json.loads(self.body)["parts"]
            data = b"".join(parts.get(part["partNumber"], b"") for part in wanted)
            if hashlib.sha256(data).hexdigest() != oid:
                return self.fail(400, "", "parts do not make the object")
            self.hub.objects[oid] = data
            return self.reply(200, {})
        return self.reply(200 if oid in self.hub.objects else 404, {})

    # The object store.

    def object_store(self, path: str) -> None:
        if self.headers.get("Authorization"):
            return self.reply(400, {"error": "a token reached the object store"})
        if self.command == "PUT":
            _, _, oid, part = path.split("/")
            with self.hub.lock:
                self.hub.stored += len(self.body)
                if part == "0":
                    self.hub.objects[oid] = self.body
                else:
                    self.hub.uploads.setdefault(oid, {})[int(part)] = self.body
            etag = hashlib.md5(self.body).hexdigest()
            return self.reply(200, b"", {"ETag": f'"{etag}"'})
        if self.query.get("signature") != [self.hub.signature]:
            return self.reply(403, {"error": "expired"})
        owner, name, revision, *file = path.removeprefix("/").split("/")
        found = self.hub.models[f"{owner}/{name}"].at(revision)
        blob = found[1]["/".join(file)]
        return self.content("/".join(file), blob, {"ETag": f'"store-{blob.sha256[:16]}"', "Accept-Ranges": "bytes"})
