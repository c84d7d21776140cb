"""One question to a teacher model at an OpenAI-compatible endpoint (POST BASE_URL/chat/completions).

The key is read from the environment and kept in here: text that comes back from the server has it struck out, so no
log, message or answer can carry it.
"""

import asyncio
import email.utils
import ipaddress
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vlmdist.errors import UserError

DEFAULT_BASE_URL = "https://api.openai.com/v1"
MAX_ANSWER_CHARS = 20_000
_MIN_SECRET_CHARS = 8  # shorter ones (EMPTY, none) are placeholders for servers that ask for no key
_TOKENS_PER_MESSAGE = 16  # role and separators of a chat template
_HOPELESS_STATUS = (401, 403, 404)  # the key, the account, the model or the address: the same for every input
_AGAIN_STATUS = (408, 409, 425, 429)  # and 5xx
_PERHAPS_BILLED_STATUS = (408, 502, 504)  # a gateway gave up, the model behind it may have answered

Message = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """Of one request: prompt and answer."""

    prompt: int = 0
    answer: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Reply:
    text: str
    """"" where the teacher said nothing."""
    finish: str
    """Why it ended; "length" is cut off."""
    tokens: Tokens | None
    """None where the server doesn't say."""


class AskFailed(Exception):
    """No answer came.

    reason: a short one to count by. detail: what the server said. again: asking again may help. hopeless: no other
    input would fare better. pause_s: how long the server asks everyone to wait, or None. perhaps_billed: the server may
    have answered all the same.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        again: bool = True,
        hopeless: bool = False,
        pause_s: float | None = None,
        perhaps_billed: bool = True,
    ):
        self.reason = reason
        self.detail = detail
        self.again = again and not hopeless
        self.hopeless = hopeless
        self.pause_s = pause_s
        self.perhaps_billed = perhaps_billed
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Teacher:
    """A model at an endpoint. Use inside one event loop and ``close`` at the end.

    request: further fields of every request (temperature, max_tokens, ...). timeout_s: of one request as a whole.
    Raises UserError for an endpoint that would show the key to others, a key that can't be one, and where the
    package openai is missing.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        key_env: str,
        request: Mapping[str, Any],
        timeout_s: float,
        allow_http: bool = False,
    ):
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise UserError(
                "asking a teacher needs the package openai: pip install openai, or pip install '.[teacher]'"
            ) from None
        self.model = model
        self._request = {k: v for k, v in request.items() if v is not None}
        self._timeout_s = timeout_s
        self._key = _read_key(key_env, base_url, allow_http)
        # its own retries would be requests that no budget counts
        self._client = AsyncOpenAI(api_key=self._key or "none", base_url=base_url, max_retries=0, timeout=timeout_s)

    async def close(self) -> None:
        await self._client.close()

    def upper_estimate(self, messages: list[Message], tokens_per_image: int) -> Tokens:
        """No request uses more: a token is a byte of text at least, and the answer is cut at the limit."""
        num_tokens = 0
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            num_tokens += _TOKENS_PER_MESSAGE
            num_tokens += sum(
                len(part["text"].encode()) if part["type"] == "text" else tokens_per_image for part in parts
            )
        return Tokens(num_tokens, answer_limit(self._request) or 0)

    async def ask(self, messages: list[Message]) -> Reply:
        """One request, no retry. AskFailed where no answer came."""
        import openai

        try:
            async with asyncio.timeout(self._timeout_s):  # the client's own limits each read, a dripping server passes
                response = await self._client.chat.completions.with_raw_response.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_body=self._request,
                )
                text = response.text
        except (TimeoutError, openai.APITimeoutError):
            raise AskFailed("time-out", f"no answer within {self._timeout_s:g} s") from None
        except openai.APIStatusError as e:
            raise self._status_failure(e.status_code, e.response.headers, e.body, e.message) from None
        except openai.APIConnectionError as e:
            raise AskFailed("connection", self._clean(str(e.__cause__ or e))) from None
        return self._reply(text)

    def _reply(self, text: str) -> Reply:
        """The first choice of a chat completion."""
        try:
            completion = json.loads(text)
            choice = completion["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            raise AskFailed("no chat completion", self._clean(text)) from None
        finish = choice.get("finish_reason")
        return Reply(
            self._strike_out(content if isinstance(content, str) else "")[:MAX_ANSWER_CHARS],
            finish if finish in ("stop", "length", "content_filter", "tool_calls") else "other",
            _usage(completion.get("usage")),
        )

    def _status_failure(self, status: int, headers: Mapping[str, str], body: object, message: str) -> AskFailed:
        said = body.get("message", message) if isinstance(body, dict) else message
        # an account without money is a 429 too, and no waiting helps
        hopeless = status in _HOPELESS_STATUS or (isinstance(body, dict) and body.get("code") == "insufficient_quota")
        return AskFailed(
            f"HTTP {status}",
            self._clean(str(said)),
            again=status in _AGAIN_STATUS or status >= 500,
            hopeless=hopeless,
            pause_s=read_retry_after(headers) if status in (429, 503) else None,
            perhaps_billed=status in _PERHAPS_BILLED_STATUS or 520 <= status < 530,
        )

    def _clean(self, text: str) -> str:
        """Server text for a message: one short line without the key."""
        return " ".join(self._strike_out(text[:MAX_ANSWER_CHARS]).split())[:200]

    def _strike_out(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= _MIN_SECRET_CHARS else text


def answer_limit(request: Mapping[str, Any]) -> int | None:
    """Most tokens of an answer that a request asks for; None where it has no limit."""
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    return limit if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0 else None


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait: Retry-After in seconds or as a date (RFC 9110), or retry-after-ms; None without either."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            return max(0.0, min(float(headers[name]) * unit, 1e9))
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):
        return None


def _usage(usage: object) -> Tokens | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    if not all(type(n) is int and 0 <= n < 1e9 for n in counts):
        return None
    return Tokens(*counts)  # type: ignore[arg-type]


def _read_key(key_env: str, base_url: str, allow_http: bool) -> str:
    """The key, "" where a server on this machine needs none."""
    try:
        url = urlsplit(base_url)
        host = url.hostname or ""
    except ValueError:
        host = ""
    if not host or url.scheme not in ("http", "https") or url.username or url.password or url.query:
        # not shown: a password or key may stand in it
        raise UserError("--base-url: give http(s)://HOST[:PORT]/PATH, without user, password or query")
    key = os.environ.get(key_env, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{key_env}: a key has printable ASCII characters only; the one in the environment has others")
    if not key and not _is_loopback(host):
        raise UserError(f"{key_env} is not set: put the key for {host} there (any word for a server that needs none)")
    if key and url.scheme == "http" and not _is_loopback(host) and not allow_http:
        raise UserError(
            f"--base-url {base_url}: http:// sends the key in {key_env} readable by anyone between; use https://, "
            "or say --allow-http"
        )
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
