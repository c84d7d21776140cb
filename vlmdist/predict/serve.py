"""``vlmdist predict --serve``: the page on this machine, until Ctrl-C or SIGTERM.

The server is ours and Gradio's page is mounted in it, so that there is no share link, nothing that calls home, and one
place where a browser is told (Content-Security-Policy) to ask nobody but this server. Uploads lie in a temporary folder
that is removed at the end.
"""

import importlib.util
import ipaddress
import os
import signal
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from vlmdist.errors import UserError
from vlmdist.predict.run import choose_device, device_name, load, open_source, say

if TYPE_CHECKING:
    import uvicorn

MAX_UPLOAD_BYTES = 32 << 20
"""Of one image."""
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_LINGER_S = 2
"""Seconds that open connections get at the end."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def serve(
    asked: str,
    *,
    checkpoint: str | None = None,
    overrides: Sequence[str] = (),
    max_new_tokens: int | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Load a model and answer on a page until the process is asked to end.

    port: 0 for any that is free. Raises UserError where Gradio isn't installed or the port can't be had.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UserError("--serve: needs Gradio: pip install 'vlmdist[serve]' (or pip install gradio)")
    with (
        _Stop() as stop,
        _listening(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="vlmdist-page-") as folder,
    ):
        only_here = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        if not only_here:
            say(f"warning: whoever reaches {host} can ask this model: there is no password")
        device = choose_device()
        source, usual = open_source(asked, overrides, checkpoint, max_new_tokens, device)
        predictor = load(source, device)
        # before Gradio looks; to find matplotlib's backend, it would have matplotlib write a cache of fonts
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "MPLBACKEND": "agg"}
        from vlmdist.predict.page import make_page

        page = make_page(source, usual, predictor, device_name(device), lambda: stop.was_asked)
        server = _server(_mounted(page, only_here))
        stop.server = server
        listener.listen()  # from here on a browser may come
        print(f"{_url(host, listener)}  (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])


class _Stop:
    """Context in which SIGINT and SIGTERM end the page, and the process with exit code 0, from its first moment on."""

    def __init__(self) -> None:
        self.server: uvicorn.Server | None = None
        self.was_asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.was_asked = True
        if self.server is None:
            raise SystemExit(0)
        self.server.should_exit = True


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            yield listener
    except (socket.gaierror, OverflowError) as e:
        raise UserError(f"--host {host} --port {port}: no such address ({e})") from None
    except OSError as e:
        raise UserError(
            f"--port {port}: can't be had on {host}: {e.strerror or e}; --port 0 takes a free one"
        ) from None


def _url(host: str, listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    name = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else host
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


def _mounted(page: Any, only_here: bool) -> Any:
    """The page as an ASGI application."""
    import gradio as gr
    from fastapi import FastAPI

    fonts = ["system-ui", "sans-serif"]  # the theme's own would be fetched
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]),
    )
    return _Guard(app, only_here)


class _Guard:
    """ASGI middleware: the headers above on every answer, and none to other pages that the user's browser is on.

    only_here: requests must name this machine as the user's browser does, lest a name elsewhere was pointed here (DNS
    rebinding).
    """

    def __init__(self, app: Any, only_here: bool):
        self._app, self._only_here = app, only_here

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = _refused(dict(scope["headers"]), self._only_here) if scope["type"] == "http" else None
        if refused is not None:
            await send({"type": "http.response.start", "status": refused, "headers": []})
            await send({"type": "http.response.body"})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *ours]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _refused(headers: dict[bytes, bytes], only_here: bool) -> int | None:
    """The status that says no; None where the request may pass."""
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    if only_here and host not in _LOOPBACK_NAMES and host.rpartition(":")[0] not in _LOOPBACK_NAMES:
        return 421  # misdirected
    if origin and origin.partition("://")[2] != host:
        return 403  # sent by another site's page
    return None


def _server(app: Any) -> "uvicorn.Server":
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # ours are set

    return Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=_LINGER_S, server_header=False))
