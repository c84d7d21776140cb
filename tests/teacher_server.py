"""A real server on this machine that speaks OpenAI's chat completions: slow, failing or talking rubbish on demand."""

import base64
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PREFIX = "Expand abbreviations for products (receipt items), additionally highlight the product, brand and category: "
PROMPT_TOKENS, ANSWER_TOKENS = 100, 20


def good_answer(item: str) -> str:
    return f"{item.title()}##Thing##-##Goods"


def completion(text: object, usage: object = None, finish: str = "stop") -> bytes:
    used = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": ANSWER_TOKENS} if usage is None else usage
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion", "model": "m", "choices": [choice], "usage": used}
    return json.dumps(body).encode()


@dataclass
class Action:
    """What the server does with one request."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""


Behaviour = Callable[[str, int], Action]
"""(input, how often it was asked before) to what is done; the input is a line, or a picture's bytes as base64."""


def always_good(item: str, _: int) -> Action:
    return Action(completion(good_answer(item)))


@dataclass
class Server:
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    times: list[float] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    most_at_once: int = 0
    now_at_once: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    """Good or bad answers whose last byte was handed over."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def num_requests(self) -> int:
        return sum(self.asked.values())


def input_of(request: dict[str, Any]) -> str:
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        assert content.startswith(PREFIX)
        return content[len(PREFIX) :]
    url = content[0]["image_url"]["url"]
    kind, data = url.split(";base64,")
    assert kind in ("data:image/jpeg", "data:image/png")
    base64.b64decode(data, validate=True)
    return str(data)


@contextlib.contextmanager
def teacher_server(behaviour: Behaviour = always_good) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            item = input_of(request)
            with state.lock:
                state.times.append(time.monotonic())
                state.requests.append(request)
                state.keys.add(self.headers.get("Authorization", ""))
                before = state.asked[item]
                state.asked[item] += 1
                state.now_at_once += 1
                state.most_at_once = max(state.most_at_once, state.now_at_once)
            try:
                self._act(behaviour(item, before), item)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up or was killed
            finally:
                with state.lock:
                    state.now_at_once -= 1

        def _act(self, action: Action, item: str) -> None:
            time.sleep(action.delay_s)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(action.body)), **action.headers}
            self.send_response(action.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(action.body[: action.cut_after])
            self.wfile.flush()
            if action.cut_after is not None:
                self.close_connection = True
            elif action.status == 200:
                with state.lock:
                    state.answered[item] += 1

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
