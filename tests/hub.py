"""A hub on this machine, as far as the real clients need one: Hugging Face's and ModelScope's.

Written from what the clients ask for (huggingface_hub 0.36 and 2.4, modelscope 1.40); it can be told
to misbehave.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Self

COMMIT = "5" * 40
LFS_FROM = 10_000
"""Bytes; larger files are told with their SHA-256, as those in Git LFS are."""
_BLOCK = 1 << 16


class Hub:
    """Serves one folder as the repository `owner/toy`; a context manager.

    Attributes:
        sent: bytes of bodies sent, by path.
        status: answer every question with this HTTP status, if it is not 0.
        gated: say so with status 403.
        cut_after: close the connection after so many bytes of a body, once for each entry.
        corrupt: change a byte of every body of this path.
        slow: seconds to wait after each block.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: dict[str, int] = {}
        self.requests: list[str] = []
        self.status = 0
        self.gated = False
        self.cut_after: list[int] = []
        self.corrupt = ""
        self.slow = 0.0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def paths(self) -> list[str]:
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        self.requests.append(handler.path)
        url = urllib.parse.urlsplit(handler.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        query = dict(urllib.parse.parse_qsl(url.query))
        if self.gated:
            return self._refuse(handler, 403, {"X-Error-Code": "GatedRepo"})
        if self.status:
            return self._refuse(handler, self.status, {})
        if parts[:4] == ["api", "models", "owner", "toy"]:
            return self._json(handler, self._info())
        if parts[:2] == ["owner", "toy"] and parts[2] == "resolve":
            return self._file(handler, "/".join(parts[4:]), body=body)
        scope = parts[:5] == ["api", "v1", "models", "owner", "toy"]
        if scope and parts[-1] == "files":
            return self._json(handler, {"Code": 200, "Success": True, "Data": self._listing()})
        if scope and parts[-1] == "revisions":
            rows = {"RevisionMap": {"Branches": [{"Revision": "master"}], "Tags": []}}
            return self._json(handler, {"Code": 200, "Success": True, "Data": rows})
        if scope and parts[-1] == "repo":
            return self._file(handler, query["FilePath"], body=body)
        if scope:
            return self._json(handler, {"Code": 200, "Success": True, "Data": {"Name": "toy"}})
        return self._refuse(handler, 404, {"X-Error-Code": "RepoNotFound"})

    def _info(self) -> dict[str, Any]:
        rows = []
        for path in self.paths():
            data = (self.folder / path).read_bytes()
            row: dict[str, Any] = {
                "rfilename": path, "size": len(data), "blobId": _git_sha1(data),
            }  # fmt: skip
            if len(data) >= LFS_FROM:
                digest = hashlib.sha256(data).hexdigest()
                row["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            rows.append(row)
        return {"id": "owner/toy", "modelId": "owner/toy", "sha": COMMIT, "siblings": rows}

    def _listing(self) -> dict[str, Any]:
        rows = []
        for path in self.paths():
            data = (self.folder / path).read_bytes()
            rows.append(
                {
                    "Name": path.split("/")[-1], "Path": path, "Size": len(data), "Type": "blob",
                    "Sha256": hashlib.sha256(data).hexdigest(), "Revision": COMMIT,
                    "IsLFS": len(data) >= LFS_FROM,
                }
            )  # fmt: skip
        return {"Files": rows, "LatestCommitter": {}, "IsVisual": 0}

    def _file(self, handler: BaseHTTPRequestHandler, path: str, *, body: bool) -> None:
        file = self.folder / path
        if not file.is_file():
            return self._refuse(handler, 404, {"X-Error-Code": "EntryNotFound"})
        data = bytearray(file.read_bytes())
        digest = hashlib.sha256(data).hexdigest()
        if path == self.corrupt:
            data[len(data) // 2] ^= 1
        start, stop = 0, len(data)
        if given := handler.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        handler.send_response(206 if given else 200)
        handler.send_header("Content-Length", str(stop - start))
        handler.send_header("ETag", f'"{digest}"')
        handler.send_header("X-Linked-Etag", f'"{digest}"')
        handler.send_header("X-Repo-Commit", COMMIT)
        handler.send_header("Accept-Ranges", "bytes")
        if given:
            handler.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
        handler.end_headers()
        if body:
            self._send(handler, path, bytes(data[start:stop]))
        return None

    def _send(self, handler: BaseHTTPRequestHandler, path: str, data: bytes) -> None:
        cut = self.cut_after.pop(0) if self.cut_after else len(data)
        try:
            for place in range(0, min(cut, len(data)), _BLOCK):
                block = data[place : min(place + _BLOCK, cut)]
                handler.wfile.write(block)
                self.sent[path] = self.sent.get(path, 0) + len(block)
                if self.slow:
                    time.sleep(self.slow)
        except OSError:  # the client is gone
            handler.close_connection = True
            return
        if cut < len(data):
            handler.close_connection = True
            handler.connection.close()

    @staticmethod
    def _json(handler: BaseHTTPRequestHandler, value: Any) -> None:
        data = json.dumps(value).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)

    @staticmethod
    def _refuse(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        data = b'{"error": "no"}'
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(data)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
