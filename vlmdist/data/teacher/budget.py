"""What asking a teacher may cost, and how fast: a budget that no kill can break, and the pace of requests."""

import asyncio
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.data.teacher.endpoint import Tokens
from vlmdist.errors import UserError
from vlmdist.run_folder import append_jsonl, mend_jsonl, read_jsonl

REQUESTS_FILE = "requests.jsonl"


class BudgetSpent(Exception):
    """The next request could go over the budget; the message says which one."""


@dataclass(frozen=True)
class Prices:
    """US dollars (or any other money) per million tokens."""

    prompt: float
    answer: float

    def cost(self, tokens: Tokens) -> float:
        return (tokens.prompt * self.prompt + tokens.answer * self.answer) / 1e6


class Budget:
    """Requests and money of all starts in one folder.

    Before a request is sent its upper estimate is written to ``file`` and counted; when it ends, what it used takes its
    place. A request that never ended (kill, cut connection) stays counted at the estimate.

    file (JSON lines): {"request", "key", "prompt", "answer"} when sent, {"request", "result", "prompt", "answer"} when
    ended; prompt and answer are tokens.
    """

    def __init__(self, file: Path, *, max_requests: int | None, max_cost: float | None, prices: Prices | None):
        if max_cost is not None and prices is None:
            raise ValueError("a budget in money needs prices")
        self.file = file
        self.max_requests = max_requests
        self.max_cost = max_cost
        self.prices = prices
        self.num_requests = 0
        self.results: Counter[str] = Counter()
        """Requests of this start by how they ended."""
        self._used = Tokens()
        self._open: dict[int, Tokens] = {}
        self._orphans: dict[int, Tokens] = {}  # sent by an earlier start that was killed
        self._overrun = 1.0
        self._settled = asyncio.Event()
        mend_jsonl(file)
        for row in read_jsonl(file):
            self._replay(row)

    @property
    def tokens(self) -> Tokens:
        """Used by all starts, with the estimates of what has not ended."""
        parts = [self._used, *self._open.values(), *self._orphans.values()]
        return Tokens(sum(t.prompt for t in parts), sum(t.answer for t in parts))

    @property
    def cost(self) -> float | None:
        return self.prices.cost(self.tokens) if self.prices else None

    def reserve(self, key: str, estimate: Tokens) -> int | None:
        """Count and note one request ahead of sending it; returns its number.

        None where only requests in flight, once ended, could make room. BudgetSpent where there is none.
        """
        wanted = Tokens(math.ceil(estimate.prompt * self._overrun), math.ceil(estimate.answer * self._overrun))
        if self.max_requests is not None and self.num_requests >= self.max_requests:
            raise BudgetSpent(f"--max-requests {self.max_requests} is reached")
        if self.prices is not None and self.max_cost is not None:
            spent, more = self.prices.cost(self.tokens), self.prices.cost(wanted)
            if spent + more > self.max_cost:
                if self._open:
                    return None
                raise BudgetSpent(
                    f"--max-cost {self.max_cost:g}: {spent:.4f} is spent, and the next request could cost {more:.4f}"
                )
        self.num_requests += 1
        number = self.num_requests
        self._open[number] = wanted
        append_jsonl(self.file, {"request": number, "key": key, "prompt": wanted.prompt, "answer": wanted.answer})
        return number

    async def wait_until_one_ends(self) -> None:
        await self._settled.wait()

    def settle(self, number: int, result: str, used: Tokens | None) -> Tokens:
        """Note how a request ended and what it used; the estimate stays where ``used`` is None. Returns what counts."""
        estimate = self._open.pop(number)
        counted = estimate if used is None else used
        append_jsonl(
            self.file, {"request": number, "result": result, "prompt": counted.prompt, "answer": counted.answer}
        )
        self._add(counted)
        self.results[result] += 1
        # a tokenizer or a picture that takes more than was thought: think bigger from now on
        pairs = ((counted.prompt, estimate.prompt), (counted.answer, estimate.answer))
        self._overrun *= max(1.0, *(actual / thought for actual, thought in pairs if thought))
        self._settled.set()
        self._settled = asyncio.Event()
        return counted

    def _add(self, tokens: Tokens) -> None:
        self._used = Tokens(self._used.prompt + tokens.prompt, self._used.answer + tokens.answer)

    def _replay(self, row: Any) -> None:
        match row:
            case {"request": int(number), "prompt": int(prompt), "answer": int(answer)} if min(prompt, answer) >= 0:
                tokens = Tokens(prompt, answer)
            case _:
                raise UserError(f"{self.file}: was not written by this script ({str(row)[:100]}); give another folder")
        if "result" in row:
            self._orphans.pop(number, None)
            self._add(tokens)
        else:
            self.num_requests += 1
            self._orphans[number] = tokens


class Pace:
    """Spreads requests evenly: at most so many requests, and so many tokens, a minute."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None):
        self._s_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._request_due = self._token_due = self._paused_until = 0.0

    def wait_s(self) -> float:
        """Seconds until the next request may be sent; 0 or less: now."""
        return max(self._request_due, self._token_due, self._paused_until) - time.monotonic()

    def sent(self, tokens: Tokens) -> None:
        """A request was sent; ``tokens``: its upper estimate."""
        now = time.monotonic()
        self._request_due = max(self._request_due, now) + self._s_per_request
        self._token_due = max(self._token_due, now) + tokens.total * self._s_per_token

    def give_back(self, tokens: int) -> None:
        """So many tokens of an estimate were not used."""
        self._token_due -= tokens * self._s_per_token

    def pause(self, seconds: float) -> None:
        """The server asks everyone to wait."""
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)
