"""A Hub on loopback: as much of its HTTP interface as the real client needs to push and pull.

Repositories live in memory. ``tokens`` says who may do what; ``before`` is called with method and path ahead of every
answer and may change a repository; ``harm`` makes downloads of a file go wrong. Everything is kept in ``requests``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

WRITE, READ = "hf_write", "hf_read"
STALL_SECONDS = 20.0
Harm = Literal["short", "corrupt", "torn once", "stalled", "unlisted"]


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool  # kept by its SHA-256 (LFS), not by git

    @property
    def git(self) -> str:
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        content = pointer.encode() if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], message: str, branch: str = "main") -> Commit:
        parent = self.branches.get(branch)
        told = json.dumps([parent, message, len(self.commits), sorted((n, b.git) for n, b in files.items())])
        made = Commit(hashlib.sha1(told.encode()).hexdigest(), parent, message, files)
        self.commits.append(made)
        self.branches[branch] = made.oid
        return made

    def at(self, revision: str) -> Commit | None:
        oid = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)

    @property
    def head(self) -> Commit:
        found = self.at("main")
        assert found is not None
        return found


class FakeHub:
    """Serves while the context is entered."""

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.tokens = {WRITE: "write", READ: "read"}
        self.large: dict[str, bytes] = {}  # uploads by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.commit_lines: list[list[dict[str, Any]]] = []
        self.harm: dict[str, Harm] = {}
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.status: dict[str, int] = {}  # answers to paths that contain this
        self.page = False  # answer everything with a web page
        self.stalled = threading.Event()
        self.go_on = threading.Event()
        self._torn: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

    def count(self, method: str, part: str) -> int:
        """Requests whose path contains ``part``."""
        return sum(m == method and part in path for m, path in self.requests)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    timeout = STALL_SECONDS
    disable_nagle_algorithm = True  # head and body are written apart

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # ---- answers -------------------------------------------------------------------------------------------------

    def _answer(self, status: int, body: Any = None, **headers: str) -> None:
        data = json.dumps(body if body is not None else {}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _web_page(self) -> None:
        data = b"<html>Please log in to this network</html>"
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        named = {"X_Error_Code": code} if code else {}
        self._answer(status, {"error": message}, X_Error_Message=message, **named)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def _right(self) -> str:
        """What the sender's token may do: "" without one, "bad" for an unknown one."""
        said = self.headers.get("Authorization", "")
        return self.hub.tokens.get(said.removeprefix("Bearer "), "bad") if said else ""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        path, query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append((self.command, path))
        self.hub.before(self.command, path)
        body = self._body()
        forced = next((status for part, status in self.hub.status.items() if part in path), None)
        if self.hub.page:
            self._web_page()
        elif path == "/api/agent-harnesses":
            self._answer(404)
        elif path.startswith("/uploads/"):  # a signed address: no token needed
            self._upload(path.removeprefix("/uploads/"), body)
        elif forced is not None:
            self._refuse(forced, "", "as the test wants")
        elif self._right == "bad":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/api/models/"):
            self._api(path.removeprefix("/api/models/"), query, body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/resolve/" in path:
            self._resolve(path[1:])
        else:
            self._answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815

    # ---- repositories --------------------------------------------------------------------------------------------

    def _visible(self, name: str) -> Repository | None:
        """None when it has been refused. Like the Hub, a stranger learns no difference between missing and private."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._right):
            self._refuse(404 if self._right else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        if self._right != "write":
            self._refuse(403 if self._right else 401, "", "You don't have the rights to create a model")
            return
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repos:
            self._refuse(409, "", "You already created this model repo")
            return
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        repo = self.hub.repos[name] = Repository(private)
        repo.commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def _api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        owner, short, *rest = path.split("/", 3)
        name = f"{owner}/{short}"
        repo = self._visible(name)
        if repo is None:
            return
        what, revision = (rest[0], rest[1]) if len(rest) == 2 else ("revision", "main")
        if what != "revision" and self._right != "write":
            self._refuse(403, "", "This token may not write")
        elif repo.at(revision) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif what == "revision":
            self._info(name, repo, revision, "blobs" in query)
        elif what == "preupload":
            self._preupload(repo, revision, json.loads(body))
        elif what == "commit":
            self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def _info(self, name: str, repo: Repository, revision: str, blobs: bool) -> None:
        commit = repo.at(revision)
        assert commit is not None
        siblings: list[dict[str, Any]] = []
        for path, blob in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if blobs:
                entry |= {"size": len(blob.data), "blobId": blob.git}
            if blobs and blob.large:
                entry["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": 130}
            siblings.append(entry)
        told = {"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "gated": repo.gated}
        self._answer(200, {**told, "tags": [], "siblings": siblings})

    # ---- push ----------------------------------------------------------------------------------------------------

    def _preupload(self, repo: Repository, revision: str, asked: dict[str, Any]) -> None:
        commit = repo.at(revision)
        assert commit is not None
        files = []
        for file in asked["files"]:
            known = commit.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            files.append(entry | ({"oid": known.etag} if known else {}))
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/uploads/{wanted['oid']}"}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400)
            return
        self.hub.large[oid] = body
        self._answer(200)

    def _commit(self, name: str, repo: Repository, branch: str, lines: list[dict[str, Any]]) -> None:
        self.hub.commit_lines.append(lines)
        before = repo.at(branch)
        assert before is not None
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, before.oid):
            self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
            return
        files = dict(before.files)
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
                case "lfsFile":
                    files[value["path"]] = Blob(self.hub.large[value["oid"]], True)
                case "deletedFile":
                    del files[value["path"]]
        made = repo.commit(files, header["summary"], branch)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{made.oid}", "commitOid": made.oid})

    # ---- pull ----------------------------------------------------------------------------------------------------

    def _resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self._visible(name)
        if repo is None:
            return
        commit = repo.at(revision)
        if repo.gated and self._right != "write":
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif file not in commit.files or self.hub.harm.get(file) == "unlisted":
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            self._send(file, commit, commit.files[file])

    def _send(self, file: str, commit: Commit, blob: Blob) -> None:
        data, harm = blob.data, self.hub.harm.get(file)
        if harm == "corrupt":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if harm == "short" and self.command == "GET":
            data = data[: len(data) // 2]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{blob.etag}"')
        self.send_header("X-Repo-Commit", commit.oid)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2
        if harm == "torn once" and file not in self.hub._torn:
            self.hub._torn.add(file)
            self.wfile.write(data[:half])
            self.close_connection = True
        elif harm == "stalled":
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.go_on.wait(STALL_SECONDS)
            self.close_connection = True
        else:
            self.wfile.write(data[start:])
