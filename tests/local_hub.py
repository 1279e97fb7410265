"""A model hub on the loopback interface: as much of its API as a snapshot download asks for."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """Holds one folder as the repository `owner/model`; `owner/gated` is forbidden and nothing else exists."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Points huggingface_hub to itself and to an empty cache.

        Args:
            folder: What the repository holds.
            cache: Directory for downloads.
            monkeypatch: Undoes the pointing.
        """
        from huggingface_hub import constants

        self.folder = folder
        self.requested: list[str] = []
        """Files that were downloaded."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._is_running = False
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{self._server.server_address[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def __enter__(self) -> LocalHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._is_running = True
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def files(self) -> dict[str, Path]:
        """Names and paths of what the repository holds."""
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path for path in found}

    def stop(self) -> None:
        """From now on connections are refused."""
        if self._is_running:
            self._is_running = False
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/model/revision/"):
            self._answer_revision(path.rpartition("/")[2])
        elif path == f"/api/models/owner/model/tree/{COMMIT}":
            self._answer_tree()
        elif path.startswith("/api/models/owner/gated/"):
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/owner/model/resolve/"):
            self._answer_file(path.partition(f"/{COMMIT}/")[2])
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _answer_revision(self, revision: str) -> None:
        if revision not in ("main", COMMIT):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [{"rfilename": name} for name in self.hub.files()]
        self._send_json({"id": "owner/model", "sha": COMMIT, "siblings": siblings})

    def _answer_tree(self) -> None:
        """What huggingface_hub 2 lists the files with."""
        sizes = {name: path.stat().st_size for name, path in self.hub.files().items()}
        self._send_json([{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()])

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer_file(self, name: str) -> None:
        if self.command == "GET":
            self.hub.requested.append(name)
        headers = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        self._send(200, (self.hub.folder / name).read_bytes(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
