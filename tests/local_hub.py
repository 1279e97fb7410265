"""A model hub on the loopback interface: as much of its API as the hub's own client asks for to download and to push."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"
"""The only token that may write."""
LFS_BYTES = 4096
"""Files from this size on, and ONNX files, are stored apart (LFS)."""


class LocalHub:
    """Holds one folder as the repository `owner/model`; `owner/gated` is forbidden.

    `others` has more repositories by name; those of data sets are named `datasets/OWNER/NAME`. A push makes its own.
    """

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Points huggingface_hub to itself and to an empty cache.

        Args:
            folder: What the repository holds.
            cache: Directory for downloads, beside which pushed repositories are stored.
            monkeypatch: Undoes the pointing.
        """
        from huggingface_hub import constants

        self.folder = folder
        self.others: dict[str, Path] = {}
        self.private: set[str] = set()
        """Names of the repositories that were created as private ones."""
        self.requested: list[str] = []
        """Files that were downloaded."""
        self.uploaded: list[str] = []
        """SHA-256 of the files that were uploaded by LFS, in their order."""
        self.num_uploads_left: int | None = None
        """How many LFS uploads are accepted before the connection breaks off; None is no limit."""
        self.storage = cache.with_name(f"{cache.name}-pushed")
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._is_running = False
        self._lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        monkeypatch.setenv("HF_ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def __enter__(self) -> LocalHub:
        # stopping takes as long as this interval
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self._is_running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def repository(self, name: str, revision: str = "main") -> Path | None:
        """The folder of a repository at a branch or a commit; None where there is none."""
        if name == "owner/model" or name in self.others:
            folder = self.others.get(name, self.folder)
            return folder if revision in ("main", COMMIT) else None
        pushed = self.storage / name
        return next((path for path in pushed.glob("*") if revision in (path.name, commit_of(path))), None)

    def has(self, name: str) -> bool:
        """Whether there is a repository of that name, at any revision."""
        return name == "owner/model" or name in self.others or (self.storage / name).is_dir()

    def takes_upload(self) -> bool:
        """Whether one more LFS upload is accepted; the client sends several at a time."""
        with self._lock:
            if self.num_uploads_left is None:
                return True
            self.num_uploads_left -= 1
            return self.num_uploads_left >= 0

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._is_running:
            self._is_running = False
            self._server.shutdown()
            self._server.server_close()


def files_in(folder: Path) -> dict[str, Path]:
    """Names and paths of what a repository holds."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def commit_of(folder: Path) -> str:
    """An id that follows from the content of a pushed branch."""
    content = json.dumps({name: _sha256(path.read_bytes()) for name, path in files_in(folder).items()})
    return hashlib.sha1(content.encode()).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_NAME = r"(?P<name>(?:datasets/)?[\w.-]+/[\w.-]+)"
_API_NAME = r"(?P<kind>models|datasets)/(?P<id>[\w.-]+/[\w.-]+)"


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.0"  # a connection for each request: bodies end with them

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_GET(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def do_PUT(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        method = "GET" if self.command == "HEAD" else self.command
        if "owner/gated" in path:
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        for expected, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == expected:
                # the addresses of single files are signed, and the client sends no token to them
                if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    message = "Invalid credentials in Authorization header"
                    return self._send(401, b'{"error": "Invalid username or password."}', {"X-Error-Message": message})
                return answer(self, **match.groupdict())
        return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    # ------------------------------------------------------------------------------------------------------- downloads

    def _folder(self, name: str, revision: str) -> Path | None:
        """The folder of a repository; None after the answer that there is none, or that it has no such revision."""
        folder = self.hub.repository(name, revision)
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if self.hub.has(name) else "RepoNotFound"})
        return folder

    def _commit(self, folder: Path) -> str:
        return commit_of(folder) if self.hub.storage in folder.parents else COMMIT

    def _answer_info(self, kind: str, id: str, revision: str = "main") -> None:
        folder = self._folder(id if kind == "models" else f"datasets/{id}", revision)
        if folder is None:
            return
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in files_in(folder).items()]
        self._send_json({"id": id, "sha": self._commit(folder), "siblings": siblings, "cardData": _metadata(folder)})

    def _answer_tree(self, kind: str, id: str, revision: str) -> None:
        """What huggingface_hub 2 lists the files with."""
        folder = self._folder(id if kind == "models" else f"datasets/{id}", revision)
        if folder is not None:
            sizes = {name: path.stat().st_size for name, path in files_in(folder).items()}
            self._send_json([{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()])

    def _answer_file(self, name: str, revision: str, path: str) -> None:
        folder = self._folder(name, revision)
        if folder is None:
            return
        if not (folder / path).is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.hub.requested.append(path)
        content = (folder / path).read_bytes()
        self._send(200, content, {"ETag": f'"{_sha256(content)}"', "X-Repo-Commit": self._commit(folder)})

    # ------------------------------------------------------------------------------------------------------------ push

    def _create(self) -> None:
        asked = self._read_json()
        name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if self.hub.has(name):
            return self._send_json({"error": "You already created this model repo", "url": url}, 409)
        (self.hub.storage / name / "main").mkdir(parents=True)
        if asked.get("private"):
            self.hub.private.add(name)
        return self._send_json({"url": url, "name": name})

    def _create_branch(self, kind: str, id: str, revision: str) -> None:
        branch = self.hub.storage / id / revision
        if branch.is_dir():
            return self._send(409, b'{"error": "Reference already exists"}', {})
        branch.mkdir(parents=True)
        return self._send_json({})

    def _validate(self) -> None:
        content = self._read_json()["content"]
        is_valid = content.startswith("---\n") and "\n---\n" in content
        errors = [] if is_valid else [{"message": "no metadata"}]
        self._send_json({"errors": errors, "warnings": []}, 200 if is_valid else 400)

    def _preupload(self, kind: str, id: str, revision: str) -> None:
        if self._folder(id, revision) is None:
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["size"] >= LFS_BYTES or each["path"].endswith(".onnx") else "regular",
                "shouldIgnore": False,
            }
            for each in self._read_json()["files"]
        ]
        self._send_json({"files": files})

    def _batch(self, name: str) -> None:
        objects = []
        for each in self._read_json()["objects"]:
            wanted: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if not self._blob(each["oid"]).is_file():
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(wanted)
        self._send_json({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> Path:
        return self.hub.storage / ".lfs" / oid

    def _put(self, oid: str) -> None:
        content = self._read()
        if not self.hub.takes_upload():
            return self._send(413, b'{"error": "the upload was broken off"}', {})
        assert _sha256(content) == oid
        self._blob(oid).parent.mkdir(parents=True, exist_ok=True)
        self._blob(oid).write_bytes(content)
        self.hub.uploaded.append(oid)
        return self._send(200, b"", {})

    def _receive_commit(self, kind: str, id: str, revision: str) -> None:
        folder = self._folder(id, revision)
        if folder is None:
            return
        for line in self._read().splitlines():
            change = json.loads(line)
            self._apply(folder, change["key"], change["value"])
        from huggingface_hub import constants

        oid = self._commit(folder)
        # the client parses the address with the endpoint that it read when it was imported
        self._send_json({"commitUrl": f"{constants.ENDPOINT}/{id}/commit/{oid}", "commitOid": oid, "success": True})

    def _apply(self, folder: Path, key: str, value: Any) -> None:
        if key == "header":
            return
        target = folder / value["path"]
        target.parent.mkdir(parents=True, exist_ok=True)
        if key == "file":
            target.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            target.write_bytes(self._blob(value["oid"]).read_bytes())
        elif key == "deletedFile":
            target.unlink()

    # ------------------------------------------------------------------------------------------------------------ HTTP

    def _read(self) -> bytes:
        """The body, with its length stated, or in chunks as the client sends a commit."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _read_json(self) -> Any:
        return json.loads(self._read())

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _metadata(folder: Path) -> dict[str, Any] | None:
    """What the hub knows of a repository's model card."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    import yaml

    found: dict[str, Any] = yaml.safe_load(card.read_text(encoding="utf-8").split("---")[1])
    return found


_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", f"/api/{_API_NAME}", _Handler._answer_info),
    ("GET", f"/api/{_API_NAME}/revision/(?P<revision>.+)", _Handler._answer_info),
    ("GET", f"/api/{_API_NAME}/tree/(?P<revision>.+)", _Handler._answer_tree),
    ("GET", f"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._answer_file),
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("POST", f"/api/{_API_NAME}/branch/(?P<revision>.+)", _Handler._create_branch),
    ("POST", f"/api/{_API_NAME}/preupload/(?P<revision>.+)", _Handler._preupload),
    ("POST", f"/api/{_API_NAME}/commit/(?P<revision>.+)", _Handler._receive_commit),
    ("POST", f"/{_NAME}[.]git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", _Handler._put),
)
"""Method, pattern of the path, and what answers."""
