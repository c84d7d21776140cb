"""A stand-in for the Hugging Face Hub from which models are downloaded, on a free port of this machine.

It speaks what huggingface_hub asks for where hf_xet is switched off (HF_HUB_DISABLE_XET=1): a repository's facts, and
HEAD and GET of its files. Repositories are local folders without folders inside; there is one commit of
each.
"""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

COMMIT = "a" * 40


class HubDownloads:
    """Runs while the context lasts. repos: folder of each by its name, OWNER/NAME."""

    def __init__(self, repos: Mapping[str, Path]):
        self.repos = repos
        server = self

        class Handler(_Handler):
            hub = server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubDownloads":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubDownloads
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, b"")
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(/revision/[^/]+)?", path):
            self._send_facts(found[1])
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/tree/[^/]+", path):
            self._send_tree(found[1])
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)", path):
            self._send_file(found[1], found[2])
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send_facts(self, name: str) -> None:
        folder = self.hub.repos.get(name)
        if folder is None:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        self._send_json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": []})

    def _send_tree(self, name: str) -> None:
        folder = self.hub.repos[name]
        self._send_json(
            [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _digest(p)[:40]}
                for p in folder.iterdir()
            ]
        )

    def _send_json(self, tree: object) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send_file(self, name: str, file: str) -> None:
        if name not in self.hub.repos:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        path = self.hub.repos[name] / file
        if not path.is_file():
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        self._send(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
