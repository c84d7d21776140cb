"""How a rank ends when something is wrong: the rank that failed first says why, once; the others follow in silence."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from vlmdist.config import RunConfig
from vlmdist.distributed import World
from vlmdist.errors import OtherRankFailed, RunFailed, StopRequested, UserError
from vlmdist.live.status import StatusFile
from vlmdist.model.memory import told_when_out_of_memory
from vlmdist.run_folder import RunFolder
from vlmdist.train.metrics import write_to_log
from vlmdist.train.signals import StoppedAtOnce
from vlmdist.train.watch.heartbeat import Heartbeat
from vlmdist.train.watch.watch import Limits, Watch

_ANOTHER_RANK_IS_TOLD_WITHIN_S = 5.0
_A_WORKER_IS_GONE = (
    "a loader worker was killed; the kernel does that when memory runs out. Lower data.num_workers, or give the job "
    "more memory"
)


def start_watch(heartbeat: Heartbeat, world: World, config: RunConfig, status: StatusFile) -> Watch:
    """Begin to watch over the ranks (all ranks). RunFailed where one has gone meanwhile."""

    def say(text: str) -> None:
        write_to_log(text)
        status.failed(text)

    limits = Limits(floor_s=config.train.hang_floor_s, start_s=config.train.start_limit_s)
    folder = RunFolder(Path(config.output_dir)).hangs_dir
    try:
        return Watch.start(heartbeat, world.rank, world.size, folder, limits, say=say)
    except RuntimeError as e:  # gloo's, of a connection that broke
        raise RunFailed(f"another rank ended while the ranks were joining ({str(e).splitlines()[0]})") from None


@contextlib.contextmanager
def ending_together(watch: Watch) -> Iterator[None]:
    """Run the block under the watch. OtherRankFailed in place of an error that another rank has told or has
    caused; RunFailed in place of a loader worker's death.
    """
    try:
        yield
    except StopRequested:
        watch.goodbye()
        raise
    except StoppedAtOnce:
        watch.failed("asked to stop while starting", StopRequested.exit_code)
        raise
    except (UserError, RunFailed) as e:  # mostly found by all ranks together
        if watch.failed(str(e), e.exit_code):
            e.from_one_rank = True
            raise
        raise OtherRankFailed(e.exit_code) from None
    except BaseException as e:
        # a connection that broke because the rank at its other end is gone is not what went wrong
        other = watch.first_failure(_ANOTHER_RANK_IS_TOLD_WITHIN_S)
        if other is not None:
            raise OtherRankFailed(other.exit_code) from None
        if not watch.failed(f"{type(e).__name__}: {e}", 1):
            raise OtherRankFailed(1) from None
        if isinstance(e, RuntimeError) and "DataLoader worker" in str(e):
            raise RunFailed(_A_WORKER_IS_GONE) from None
        raise
    watch.goodbye()


def free_of_memory_errors(step: int, keys: Callable[[], list[str]]) -> contextlib.AbstractContextManager[None]:
    """RunFailed, with what to lower, where a step runs out of memory."""
    return told_when_out_of_memory(
        f"in step {step}",
        keys,
        "Lower train.per_device_train_batch_size, train.max_tokens_per_micro_batch or data.max_length, or turn on "
        "model.gradient_checkpointing",
    )
