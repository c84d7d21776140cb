"""The three ways in which a command ends badly, and a sample that can't be used.

Every command turns these into one clear message and an exit code (see ``vlmdist.cli``):
0 done, 1 failed, 2 wrong use or wrong input, 85 stopped on request with a checkpoint.
"""

from collections.abc import Iterable


class UserError(Exception):
    """Wrong use or wrong input: the user can mend it. All that was found wrong is told at once.

    problems: one sentence each: what, where, what is allowed, what to do.
    """

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """The run could not go on although its input was well-formed (bad-sample budget spent, NaN, disk full)."""

    exit_code = 1


class StopRequested(Exception):
    """A signal or the end of the allocation asked the run to stop; its checkpoint is written."""

    exit_code = 85


class BadSample(Exception):
    """One sample can't be used. It is counted and named; the run goes on within its failure budget."""
