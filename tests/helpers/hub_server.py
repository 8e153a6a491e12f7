"""A hub on this machine: as much of its HTTP API as lists, downloads, gates and uploads models. HF_ENDPOINT names it.

Like the hub it answers 401 to strangers who ask for what is not there, gates files but not their list, and takes weights by LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "Y" * 34  # of the user `you`, who may read what is gated
NAME = r"([\w.-]+/[\w.-]+)"
Files = dict[str, bytes]


@dataclass
class Repo:
    """`commits` by hash, and the hash of each branch. `claims` are sizes that the server says of files, whatever they have."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    visibility: str = "public"
    claims: dict[str, int] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = files, sha
        return sha

    @property
    def files(self) -> Files:
        return self.commits[self.refs["main"]]


class Hub:
    """The server. `asked` lists method, path, range and token of every request."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.asked: list[tuple[str, str, str, str]] = []
        self.stored: Files = {}  # uploaded by LFS, by SHA-256
        self.address = ("127.0.0.1", 0)
        self._open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def add(self, name: str, folder: Path, extra: Files | None = None, **how) -> Repo:
        """A repository with the files of a folder."""
        self.repos[name] = Repo(**how)
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        self.repos[name].commit({**files, **(extra or {})})
        return self.repos[name]

    def fetched(self, name: str) -> list[tuple[str, str]]:
        """File and range of every download from a repository."""
        gets = [
            (path.partition("/resolve/")[2], part)
            for method, path, part, _ in self.asked
            if method == "GET" and f"/{name}/" in path
        ]
        return [(path.partition("/")[2], part) for path, part in gets if path]

    @contextmanager
    def closed(self):
        """Nobody listens at the address."""
        self.close()
        try:
            yield
        finally:
            self._open()

    def _open(self) -> None:
        self._server = ThreadingHTTPServer(self.address, _Handler)
        self._server.hub, self._server.daemon_threads = self, True
        self.address = self._server.server_address
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path, self.headers.get("Range") or "", self.token))
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                return answer(self, hub, *match.groups())
        self._json({"error": "Not found"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content) if length is None else length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _files(self, hub: Hub, name: str, revision: str) -> tuple[Repo, str] | None:
        """Repository and commit, if they may be seen; otherwise the refusal is sent."""
        repo = hub.repos.get(name)
        if repo is None or (repo.visibility == "private" and self.token != TOKEN):
            error = "Repository not found" if self.token else "Invalid username or password."
            code = {"X_Error_Code": "RepoNotFound"} if self.token else {}
            return self._json({"error": error}, 404 if self.token else 401, X_Error_Message=error, **code)
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            error = f"Invalid rev id: {revision}"
            return self._json({"error": error}, 404, X_Error_Code="RevisionNotFound", X_Error_Message=error)
        return repo, sha

    def _info(self, hub: Hub, name: str, revision: str | None = None) -> None:
        if found := self._files(hub, name, revision or "main"):
            repo, sha = found
            siblings = [{"rfilename": file} for file in sorted(repo.commits[sha])]
            self._json(
                {"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "downloads": 0, "siblings": siblings}
            )

    def _tree(self, hub: Hub, name: str, revision: str) -> None:
        if found := self._files(hub, name, revision):
            repo, sha = found
            self._json([_entry(file, content, repo) for file, content in sorted(repo.commits[sha].items())])

    def _resolve(self, hub: Hub, name: str, revision: str, file: str) -> None:
        found = self._files(hub, name, revision)
        if not found:
            return None
        repo, sha = found
        if repo.is_gated and self.token != TOKEN:
            error = f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
            return self._json({"error": error}, 401, X_Error_Code="GatedRepo", X_Error_Message=error)
        if file not in repo.commits[sha]:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        content = repo.commits[sha][file]
        about = {"ETag": f'"{_etag(file, content)}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted:
            return self._send(content, 200, repo.claims.get(file), **about)
        part = content[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
        last = int(wanted[1]) + len(part) - 1
        return self._send(part, 206, Content_Range=f"bytes {wanted[1]}-{last}/{len(content)}", **about)

    def _create(self, hub: Hub) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self._may_write(name):
            return None
        known = name in hub.repos
        if not known:
            hub.repos[name] = Repo(visibility=asked.get("visibility") or ("private" if asked.get("private") else "public"))
            hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._json({"url": f"{hub.url}/{name}", "id": name}, 409 if known else 200)

    def _may_write(self, name: str) -> bool:
        """Whether the token is that of the repository's owner; otherwise the refusal is sent."""
        if self.token != TOKEN or not name.startswith("you/"):
            error = "You don't have the rights to do that" if self.token else "Invalid username or password."
            self._json({"error": error}, 403 if self.token else 401, X_Error_Message=error)
            return False
        return True

    def _preupload(self, hub: Hub, name: str, _revision: str) -> None:
        if self._may_write(name):
            files = [
                {"path": file["path"], "shouldIgnore": False, "uploadMode": _mode(file["path"])} for file in self._asked("files")
            ]
            self._json({"files": files})

    def _lfs_batch(self, hub: Hub, name: str) -> None:
        if self._may_write(name):
            upload = lambda oid: {"upload": {"href": f"{hub.url}/lfs/{oid}"}, "verify": {"href": f"{hub.url}/lfs/verify"}}  # noqa: E731
            objects = [{**o, **({} if o["oid"] in hub.stored else {"actions": upload(o["oid"])})} for o in self._asked("objects")]
            self._json({"transfer": "basic", "objects": objects})

    def _asked(self, key: str) -> list[dict]:
        return json.loads(self.body)[key]

    def _store(self, hub: Hub, oid: str) -> None:
        is_right = hashlib.sha256(self.body).hexdigest() == oid
        if is_right:
            hub.stored[oid] = self.body
        self._send(b"", 200 if is_right else 400)

    def _commit(self, hub: Hub, name: str, branch: str) -> None:
        if not self._may_write(name):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(hub.repos[name].files)
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = hub.stored[value["oid"]]
        sha = hub.repos[name].commit(files, branch)
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{name}/commit/{sha}"})


def _mode(file: str) -> str:
    return "lfs" if file.endswith(".safetensors") else "regular"


def _etag(file: str, content: bytes) -> str:
    """SHA-256 for LFS, and git's hash of a blob for the rest."""
    if _mode(file) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(file: str, content: bytes, repo: Repo) -> dict:
    nbytes, oid = repo.claims.get(file, len(content)), _etag(file, content)
    lfs = {"lfs": {"oid": oid, "size": nbytes, "pointerSize": 134}} if _mode(file) == "lfs" else {}
    return {"type": "file", "path": file, "size": nbytes, "oid": oid[:40], **lfs}


ROUTES = (
    (("GET",), rf"/api/models/{NAME}", _Handler._info),
    (("GET",), rf"/api/models/{NAME}/revision/(.+)", _Handler._info),
    (("GET",), rf"/api/models/{NAME}/tree/(.+)", _Handler._tree),
    (("GET", "HEAD"), rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
    (("POST",), "/api/repos/create", _Handler._create),
    (("POST",), "/api/validate-yaml", lambda self, hub: self._json({"errors": [], "warnings": []})),
    (("POST",), rf"/api/models/{NAME}/preupload/(.+)", _Handler._preupload),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _Handler._store),
    (("POST",), "/lfs/verify", lambda self, hub: self._json({})),
    (("POST",), rf"/api/models/{NAME}/commit/(.+)", _Handler._commit),
)
