"""A real HTTP server over a local folder that can behave as badly as servers do."""

import http.server
import re
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType


class FileServer:
    """Serves ``folder`` on a free port of this machine, with ranges and ETags, while the context lasts.

    The attributes below may be changed at any time. requests counts "METHOD /path"; bytes_sent those of all bodies.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ranges = True
        self.etags: dict[str, str] = {}
        """ETag by file name, instead of one from size and time of change."""
        self.cut_after: int | None = None
        """Bytes of a body after which the connection breaks."""
        self.statuses: list[int] = []
        """Answers to the next GETs instead of the file."""
        self.forbidden = False
        self.delay_s = 0.0
        """Before an answer."""
        self.pause_s = 0.0
        """Before every 64 KiB of a body."""
        self.requests: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bytes_sent = 0
        self.lock = threading.Lock()
        server = self

        class Handler(_Handler):
            owner = server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FileServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fetches(self, name: str) -> int:
        """GETs of files of that name."""
        return sum(n for request, n in self.requests.items() if request.startswith("GET") and request.endswith(name))


class _Handler(http.server.BaseHTTPRequestHandler):
    owner: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        owner = self.owner
        path = self.path.partition("?")[0]
        with owner.lock:
            owner.requests[f"{self.command} {path}"] += 1
            owner.headers.append(dict(self.headers))
            status = owner.statuses.pop(0) if with_body and owner.statuses else 403 if owner.forbidden else 200
        time.sleep(owner.delay_s)
        file = owner.folder / path.lstrip("/")
        if status == 200 and not file.is_file():
            status = 404
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        start, stop = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if owner.ranges else None
        if wanted:
            start, stop = int(wanted[1]), min(int(wanted[2] or size) + bool(wanted[2]), size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", owner.etags.get(file.name, f'"{size}-{file.stat().st_mtime_ns}"'))
        self.end_headers()
        if with_body:
            self._send(file, start, stop)

    def _send(self, file: Path, start: int, stop: int) -> None:
        sent = 0
        with open(file, "rb") as f:
            f.seek(start)
            while start + sent < stop:
                time.sleep(self.owner.pause_s)
                piece = f.read(min(1 << 16, stop - start - sent))
                if self.owner.cut_after is not None:
                    piece = piece[: self.owner.cut_after - sent]
                try:
                    self.wfile.write(piece)
                except OSError:  # the client has gone
                    piece = b""
                if not piece:
                    self.close_connection = True
                    return
                sent += len(piece)
                self.owner.bytes_sent += len(piece)
