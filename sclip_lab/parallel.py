"""Many pictures at once: beside one another on a processor, in batches on a GPU, in shards on processes and machines.

Whatever the way, what is made of a picture is the same, and comes as soon as it is there.
"""

import sys
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from textwrap import shorten
from typing import TypeVar

import torch
from tqdm import tqdm

BATCH = 64  # pictures of a GPU's first batch
SHARD = 32  # pictures of the largest shard

Read = TypeVar("Read")
Result = TypeVar("Result")


def progress(results: Iterable[Result], about: str, total: int) -> Iterator[Result]:
    """The results, with a bar of pictures per second and remaining time, unless there is nothing to do or to say."""
    yield from tqdm(results, about, total, unit="image", file=sys.stdout, disable=not (about and total))


def side_by_side(
    work: Callable[[str], Result], keys: Collection[str], about: str = ""
) -> Generator[Result, None, None]:
    """What `work` makes of each key, in their order, as many at a time as torch has threads; with a bar `about` it.

    Each has one thread for itself: what follows from one picture is too small to be shared among threads, which wait
    for one another, for long where the machine is busy. Nor do results then depend on the number of threads.
    """
    threads, one = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    one()
    try:
        with ThreadPoolExecutor(threads, initializer=one) as pool:
            yield from progress(pool.map(work, keys), about, len(keys))
    finally:
        torch.set_num_threads(threads)


def in_batches(
    read: Callable[[str], Read], work: Callable[[Sequence[Read]], Iterable[Result]], keys: Iterable[str]
) -> Generator[Result, None, None]:
    """What `work` makes of BATCH keys at a time, read ahead in the background, in their order.

    Where a GPU's memory does not do for a batch, it and all that follow are half as large. Raises
    torch.OutOfMemoryError where it does not do for one picture.
    """
    size, batch = BATCH, list[Read]()
    with ThreadPoolExecutor() as pool:
        coming = _ahead(pool, read, keys)
        while batch := batch + list(islice(coming, max(size - len(batch), 0))):
            try:
                yield from list(work(batch[:size]))
                batch = batch[size:]
                continue
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            # Only here is it forgotten what the failure had held.
            size = min(size, len(batch)) // 2 or 1
            torch.cuda.empty_cache()


def _ahead(pool: ThreadPoolExecutor, read: Callable[[str], Read], keys: Iterable[str]) -> Iterator[Read]:
    """What is read, in order, while the next are being read."""
    waiting: deque[Future[Read]] = deque()
    for key in keys:
        waiting.append(pool.submit(read, key))
        if len(waiting) > 2 * BATCH:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def in_shards(
    work: Callable[[Sequence[str]], Iterable[Result]], keys: Sequence[str], n_jobs: int
) -> Generator[Result, None, None]:
    """What `work` makes of shards of the keys, as they come, by joblib: on `n_jobs` processes (-1: all cores).

    Or on whatever `joblib.parallel_config` names around the call, as the workers of a Dask cluster, of which two should
    be there: with a single one joblib does the work here, with none it gives up after ten seconds.

    Raises TypeError for work that cannot be pickled, RuntimeError where a local process is killed.
    """
    import cloudpickle
    from joblib import Parallel, delayed, effective_n_jobs
    from joblib.externals.loky.process_executor import TerminatedWorkerError
    from joblib.parallel import get_active_backend

    backend = get_active_backend()[0]
    if not getattr(backend, "supports_sharedmem", False):  # some would wait forever for what cannot be sent
        try:
            cloudpickle.dumps(work)
        except Exception as error:
            advice = "expected functions and readers that can be pickled; n_jobs=None measures in this process"
            raise TypeError(f"work cannot be sent to processes ({shorten(str(error), 160)}): {advice}") from None
    size = max(min(SHARD, len(keys) // (4 * effective_n_jobs(n_jobs))), 1)
    shards = (keys[start : start + size] for start in range(0, len(keys), size))
    # All are handed out at once: joblib's default is as many as keep busy the workers that are there at the beginning.
    comes = backend.supports_return_generator  # those of Ray and Spark answer at the end only
    parallel = Parallel(n_jobs, pre_dispatch="all", return_as="generator_unordered" if comes else "list")
    try:
        for results in parallel(delayed(work)(shard) for shard in shards):
            yield from results
    except TerminatedWorkerError:
        advice = "what was measured is kept; run again, with a smaller n_jobs if memory was short"
        raise RuntimeError(f"one of n_jobs={n_jobs} processes was killed: {advice}") from None
