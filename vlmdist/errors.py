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

    from_one_rank = False
    """Not what all ranks find in the same input: the rank that raises it must say it, whichever it is."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunFailed(Exception):
    """The run could not go on although its input was well-formed (bad-sample budget spent, NaN, disk full)."""

    exit_code = 1
    from_one_rank = True


class StopRequested(Exception):
    """A signal or the end of the allocation asked the run to stop; its checkpoint is written."""

    exit_code = 85


class OtherRankFailed(Exception):
    """Another rank failed first and has said why: this one ends without a word, with the same exit code."""

    def __init__(self, exit_code: int):
        self.exit_code = exit_code
        super().__init__(f"another rank ended with exit code {exit_code}")


class BadSample(Exception):
    """One sample can't be used. It is counted and named; the run goes on within its failure budget."""
