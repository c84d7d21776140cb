"""A stand-in for the Hugging Face Hub: the calls that uploading a folder needs, on a free port of this machine.

It speaks what huggingface_hub speaks where hf_xet is switched off (HF_HUB_DISABLE_XET=1): whoami, repository creation
and description, the check of a model card's front matter, preupload, Git LFS' batch, upload and verify, and the commit
as lines of JSON. What arrives is checked as the Hub checks it (digest and size of every object, the sample of every
file) and kept byte for byte in ``repos``. It has no accounts, no history and no parallel parts of large objects.

Protocols: https://huggingface.co/docs/hub/api, https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import yaml

USER = "me"
_LARGE = (".safetensors", "tokenizer.json")  # what a new repository's .gitattributes hands to LFS
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0


@dataclass
class Request:
    method: str
    path: str
    authorization: str | None


class HubServer:
    """Runs while the context lasts.

    token: the one that is accepted. fail: (part of a path, status), each answered once instead of what was asked.
    """

    def __init__(self, token: str):
        self.token = token
        self.fail: list[tuple[str, int]] = []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """LFS objects by SHA-256."""
        self.samples: dict[str, bytes] = {}
        """First bytes of each file, as preupload was told them."""
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            hub = server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def asked(self, part: str) -> list[Request]:
        return [r for r in self.requests if part in r.path]


class _Refused(Exception):
    def __init__(self, status: int, message: str, **more: str):
        self.status = status
        self.answer = {"error": message, **more}
        super().__init__(message)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self._read_body()
        path = self.path.partition("?")[0]
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, self.headers.get("Authorization")))
            try:
                self._fail_if_told(path)
                self._send(200, self._route(path, body))
            except _Refused as e:
                self._send(e.status, e.answer)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, tree: dict[str, Any]) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail_if_told(self, path: str) -> None:
        for i, (part, status) in enumerate(self.hub.fail):
            if part in path:
                del self.hub.fail[i]
                raise _Refused(status, f"told to answer {status}")

    def _route(self, path: str, body: bytes) -> dict[str, Any]:
        hub = self.hub
        if path.startswith("/storage/"):  # elsewhere, under a signed address: the token has no business there
            return self._store(path.removeprefix("/storage/"), body)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            raise _Refused(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return {"type": "user", "name": USER, "orgs": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _validate_card(json.loads(body)["content"])
        if path == "/lfs/verify":
            return self._verify(json.loads(body))
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._repo(found[1])
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+?)/preupload/main", path):
            self._repo(found[1])
            return self._preupload(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+?)/commit/main", path):
            return self._commit(found[1], body)
        if found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)", path):
            return {"id": found[1], "private": self._repo(found[1]).private, "siblings": [], "tags": []}
        raise _Refused(404, f"the stand-in knows no {self.command} {path}")

    def _repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise _Refused(404, "Repository not found")
        return self.hub.repos[name]

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise _Refused(409, "You already created this model repo", url=url)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": url, "name": name}

    def _preupload(self, asked: dict[str, Any]) -> dict[str, Any]:
        answers = []
        for file in asked["files"]:
            self.hub.samples[file["path"]] = base64.b64decode(file["sample"])
            mode = "lfs" if file["path"].endswith(_LARGE) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        return {"files": answers}

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for wanted in asked["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs/verify"},
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> dict[str, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the object is not what its name says")
        self.hub.objects[oid] = body
        return {}

    def _verify(self, asked: dict[str, Any]) -> dict[str, Any]:
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(422, "the object has another size")
        return {}

    def _commit(self, name: str, body: bytes) -> dict[str, Any]:
        repo = self._repo(name)
        if self.headers["Content-Type"] != "application/x-ndjson":
            raise _Refused(400, "a commit is lines of JSON")
        header, *lines = [json.loads(line) for line in body.splitlines()]
        if header["key"] != "header" or not header["value"]["summary"]:
            raise _Refused(400, "a commit begins with its header")
        files = {line["value"]["path"]: self._content(line["key"], line["value"]) for line in lines}
        wrong = [path for path, data in files.items() if self.hub.samples[path] != data[:512]]
        if wrong:
            raise _Refused(400, f"not what preupload was told: {wrong}")
        repo.files |= files
        repo.commits += 1
        oid = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"}

    def _content(self, key: str, value: dict[str, Any]) -> bytes:
        if key == "file":
            return base64.b64decode(value["content"], validate=True)
        if key != "lfsFile" or value["oid"] not in self.hub.objects:
            raise _Refused(400, f"{value['path']}: no such object was uploaded")
        return self.hub.objects[value["oid"]]


def _validate_card(text: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    facts = yaml.safe_load(found[1]) if found else {}
    base = facts.get("base_model")
    if base is not None and not _REPO_ID.fullmatch(base):
        raise _Refused(400, '"base_model" must be a name on the Hub')
    return {"errors": [], "warnings": [] if facts else [{"message": "empty or missing yaml metadata in repo card"}]}
