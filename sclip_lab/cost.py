"""What a piece of work costs: operations, memory, time. Work is a function of nothing, such as a `partial`."""

import weakref
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], object]


def flops(work: Work) -> int:
    """Operations by torch's own counter: of matrix products, convolutions and attention, a multiply-add is two.

    Norms, softmax, activations and interpolation are not counted. The same in every run.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # where it is taken, attention is an operation that is not counted
    try:
        with FlopCounterMode(display=False) as counter:
            work()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def peak(work: Work) -> int:
    """The most bytes that tensors made by the work held at once, on any device. The same in every run.

    What was there before (weights, input) is left out, and so are what a single operation holds while it runs and what
    the process keeps back from the system, which depend on the machine.
    """
    with _Held() as held:
        work()
    return held.most


def fastest(works: Sequence[Work], rounds: int = 5) -> list[float]:
    """Least seconds of each work, on one thread: where the machine is busy, threads wait long for one another.

    They take turns, so that a busy moment falls on all alike. Seconds of a shared machine are worth little: compare
    those of one call.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spent = [[_seconds(work) for work in works] for _ in range(rounds)]
    finally:
        torch.set_num_threads(threads)
    return [min(each) for each in zip(*spent, strict=True)]


def _seconds(work: Work) -> float:
    begin = perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


class _Held(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end. Views share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes of each storage; none of those that were there before
        self.most = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._follow((args, kwargs), before=True)
        made = op(*args, **(kwargs or {}))
        self._follow(made, before=False)
        self.most = max(self.most, sum(self.alive.values()))
        return made

    def _follow(self, values: Any, before: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := (storage := value.untyped_storage())._cdata) not in self.alive:
                self.alive[key] = 0 if before else storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
