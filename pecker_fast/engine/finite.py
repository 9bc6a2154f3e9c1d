"""Keeps NaN and infinity away from the weights: at once where the host computes, without waiting where a device does."""

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from pecker_kernels import MaskedAdam
from torch import Tensor

from pecker_fast.errors import NonFiniteError
from pecker_fast.forgetting import Gradients
from pecker_fast.machine import part

STEEPEST = 1e18  # of a gradient; squares of some more overflow float32, and a moment that is infinite stops its weight for ever


class FiniteGuard:
    """Two ways to the same end: no weight, moment or average is written from a gradient that is not finite, nor after one.

    At once (`late=False`, the CPU): `check` looks at each gradient before its step and raises, beyond `STEEPEST` too.
    Late (a device): the optimizers look, on the device, and skip the step; `flag` then keeps the number of the update that
    failed first, and while it is not zero no optimizer steps and the average stands still. The host reads the flag one
    iteration behind, so it never waits for work it has only just queued, and is never more than one iteration ahead.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self.device, self.late = device, late
        self.flag = torch.zeros((), device=device)  # 0 = all was finite, else the update's number; sticky
        self._ignored = False
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def arm(self, optimizers: Iterable[MaskedAdam]) -> None:
        """Let the flag stop these optimizers, and let them look at their own gradients."""
        for optimizer in optimizers:
            if self.late:
                optimizer.found_inf = self.flag  # type: ignore[attr-defined]  # as torch.amp.GradScaler hands it over
            for group in optimizer.param_groups:
                group["check_finite"] = self.late

    def check(self, where: str, what: str, grads: Gradients, named: Sequence[tuple[str, Tensor]]) -> None:
        """Raise NonFiniteError before anything is written; late, the optimizers see to it."""
        if self.late:
            return
        with part("finite_check"):
            if are_gradients(grads) or self._ignored:
                return
        bad = next(name for (name, _), g in zip(named, grads) if not are_gradients([g]))
        raise non_finite(where, f"{what} tensor {bad}")

    def note(self, optimizer: MaskedAdam, update: int) -> None:
        """After a step: keep the number (from 1) of the first update that was skipped."""
        if self.late and optimizer.skipped is not None:
            self.flag.copy_(torch.where(self.flag == 0, optimizer.skipped * update, self.flag))

    def record(self, step: int) -> None:
        """After iteration `step`: send the flag on its way to the host."""
        if not self.late:
            return
        if self.device.type != "cuda":
            self._pending.append((step, self.flag.clone(), None))
            return
        slot = torch.empty((), pin_memory=True)
        slot.copy_(self.flag, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((step, slot, event))

    def failed(self, behind: int) -> tuple[int, int] | None:
        """(step, update) that failed first, of all recorded iterations but the last `behind`; None if none did."""
        while len(self._pending) > behind:
            step, slot, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            if update := int(slot):
                return step, update
        return None

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Inside, `check` looks and says nothing: for gradients that no step is taken on."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, `check` raises. The flag keeps on stopping every optimizer it was given to."""
        late, self.late = self.late, False
        try:
            yield
        finally:
            self.late = late


def are_gradients(grads: Gradients) -> bool:
    """Whether all values are finite and none is beyond `STEEPEST`. None and empty tensors count as finite."""
    live = [g.detach() for g in grads if g is not None and g.numel()]
    if all(g.device.type == "cpu" for g in live):
        return all(float(low) >= -STEEPEST and float(high) <= STEEPEST for low, high in map(torch.aminmax, live))
    norms = torch._foreach_norm(live, float("inf"))  # one answer to wait for
    return bool(torch.stack([n.to(live[0].device, torch.float64) for n in norms]).max() <= STEEPEST)


def non_finite(where: str, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"{where}: the gradient of {what} is not finite, or beyond {STEEPEST:g}; it was not applied and checkpoints are as they "
        "were; start over (resume=never) with a lower lr or optimizer.clip_value"
    )
