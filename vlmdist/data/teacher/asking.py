"""Asking a teacher model: many requests at once, within a budget and a pace, retried, stopped at any moment.

Every answer is on the disk (teacher_answers.py) before the next step, every request is noted before it is sent
(teacher_budget.py): a SIGKILL loses no more than the requests in flight, and those stay counted.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from vlmdist.data.teacher.answers import AnswerLog, Question
from vlmdist.data.teacher.budget import Budget, BudgetSpent, Pace
from vlmdist.data.teacher.endpoint import AskFailed, Teacher, Tokens
from vlmdist.errors import BadSample, RunFailed, StopRequested

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_S = 5.0
"""For requests in flight, after a stop signal."""
MAX_PAUSE_S = 600.0
"""A server that asks for a longer wait ends the run."""
_MAX_BACKOFF_S = 60.0
_NUM_HOPELESS = 10  # inputs in a row without any answer: the endpoint is down, or refuses what we send
_POLL_S = 0.1


class StoppedBySignal(StopRequested):
    """All answers so far are kept."""

    def __init__(self, number: signal.Signals):
        self.exit_code = 130 if number == signal.SIGINT else StopRequested.exit_code
        super().__init__(f"stopped by {number.name}")


@dataclass
class Asking:
    """Asks a teacher all questions that have no answer yet.

    concurrency: most requests at once. max_attempts: requests for one answer where they fail. num_asks: answers that
    are asked for where they are rejected. backoff_s: first wait after a failure, doubled at each, with jitter.
    """

    teacher: Teacher
    log: AnswerLog
    budget: Budget
    pace: Pace
    concurrency: int
    max_attempts: int
    num_asks: int
    backoff_s: float
    tokens_per_image: int
    on_change: Callable[[], None] = lambda: None
    """Called whenever ``num_done`` grows."""
    failures: Counter[str] = field(default_factory=Counter)
    """Inputs given up in this start, by reason; another start asks them again."""
    num_done: int = 0
    """Inputs that this start is through with: answered, or given up."""

    def run(self, questions: Sequence[Question]) -> None:
        """Ends when nothing is left to ask.

        RunFailed where the budget, the endpoint or the network doesn't allow that; StoppedBySignal after a signal. In
        each case everything so far is kept.
        """
        asyncio.run(self._run(questions))

    def is_open(self, question: Question) -> bool:
        """True where an answer is still to be asked for."""
        verdict = self.log.verdict(question)
        return verdict.answer is None and verdict.num_answers < self.num_asks

    async def _run(self, questions: Sequence[Question]) -> None:
        self._queue = deque(q for q in questions if self.is_open(q))
        self._gate = asyncio.Lock()
        self._stop = asyncio.Event()
        self._signalled = asyncio.Event()
        self._why: Exception | None = None
        self._failed_in_a_row = 0
        workers = [asyncio.create_task(self._work()) for _ in range(min(self.concurrency, len(self._queue)))]
        try:
            with self._listening_to_signals():
                await self._finish(workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self.teacher.close()
        if self._why is not None:
            raise self._why

    async def _finish(self, workers: Sequence["asyncio.Task[None]"]) -> None:
        """Wait for the workers: to their end (answers on their way are paid for), or a few seconds after a signal."""
        signalled = asyncio.create_task(self._signalled.wait())
        pending = set(workers)
        while pending and not self._signalled.is_set():
            done, _ = await asyncio.wait({*pending, signalled}, return_when=asyncio.FIRST_COMPLETED)
            for worker in done & pending:
                worker.result()
            pending -= done
        signalled.cancel()
        if pending:
            done, _ = await asyncio.wait(pending, timeout=GRACE_S)
            for worker in done:
                worker.result()

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop_by_signal, number)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _stop_by_signal(self, number: signal.Signals) -> None:
        self._why = StoppedBySignal(number)
        self._signalled.set()
        self._stop.set()

    def _end(self, why: Exception) -> None:
        """Send nothing more. The first reason holds."""
        self._why = self._why or why
        self._stop.set()

    # --- one of ``concurrency`` workers -------------------------------------------------------------------------------

    async def _work(self) -> None:
        while self._queue and not self._stop.is_set():
            question = self._queue.popleft()
            try:
                answered = await self._ask(question)
            except BudgetSpent as e:
                self._end(RunFailed(f"the budget is spent: {e}"))
            except BadSample as e:
                self._give_up(str(e))
            else:
                if answered and self.is_open(question):
                    self._queue.append(question)  # rejected: asked again when the others were
                elif answered:
                    self._count_done()

    async def _ask(self, question: Question) -> bool:
        """True where an answer came, good or bad."""
        messages = question.messages()
        for attempt in range(1, self.max_attempts + 1):
            estimate = self.teacher.upper_estimate(messages, self.tokens_per_image)
            number = await self._admit(question.key, estimate)
            if number is None:
                return False
            started = time.monotonic()
            try:
                reply = await self.teacher.ask(messages)
            except AskFailed as e:
                used = self.budget.settle(number, e.reason, None if e.perhaps_billed else Tokens())
                self.pace.give_back(estimate.total - used.total)
                if not await self._may_go_on(e, attempt):
                    return False
                continue
            # the answer first: killed between the two, it is kept and counted at its estimate
            tokens = reply.tokens or estimate
            verdict = self.log.add(question, reply, tokens, time.monotonic() - started)
            self.budget.settle(number, "answered" if verdict.answer is not None else "rejected", reply.tokens)
            self.pace.give_back(estimate.total - tokens.total)
            self._failed_in_a_row = 0
            return True
        return False

    async def _admit(self, key: str, estimate: Tokens) -> int | None:
        """The number of a request that may be sent now; None where the run ends. One waits here at a time."""
        async with self._gate:
            while not self._stop.is_set():
                wait_s = self.pace.wait_s()
                if wait_s > 0:
                    await self._sleep(min(wait_s, _POLL_S))  # a token given back may shorten it
                    continue
                number = self.budget.reserve(key, estimate)
                if number is not None:
                    self.pace.sent(estimate)
                    return number
                await self.budget.wait_until_one_ends()
        return None

    async def _may_go_on(self, failure: AskFailed, attempt: int) -> bool:
        """False where this input is given up; else the wait before its next attempt is over."""
        if failure.hopeless:
            self._end(RunFailed(f"the endpoint refuses: {failure}"))
            return False
        if (failure.pause_s or 0) > MAX_PAUSE_S:
            self._end(RunFailed(f"the endpoint asks for a pause of {failure.pause_s:.0f} s ({failure})"))
            return False
        if failure.pause_s is not None:
            self.pace.pause(failure.pause_s)
        if not failure.again or attempt == self.max_attempts:
            self._give_up(failure.reason, str(failure))
            return False
        if failure.pause_s is None:
            await self._sleep(min(self.backoff_s * 2 ** (attempt - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1))
        return True

    def _give_up(self, reason: str, said: str = "") -> None:
        self.failures[reason] += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _NUM_HOPELESS:
            self._end(RunFailed(f"{_NUM_HOPELESS} inputs in a row got no answer, the last one: {said or reason}"))
        self._count_done()

    def _count_done(self) -> None:
        self.num_done += 1
        self.on_change()

    async def _sleep(self, seconds: float) -> None:
        """Less when the run ends."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)
