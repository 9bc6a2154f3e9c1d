"""What an iteration costs, part by part: FLOPs, bytes, time, memory, energy."""

from pecker_fast.account.clock import Clock, joules, stopwatch
from pecker_fast.account.counter import OTHER, Counter
from pecker_fast.account.iteration import Account, Accountant, add_times, counted
from pecker_fast.account.live import LiveBytes
from pecker_fast.account.rate import measured_rate

__all__ = [
    "OTHER",
    "Account",
    "Accountant",
    "Clock",
    "Counter",
    "LiveBytes",
    "add_times",
    "counted",
    "joules",
    "measured_rate",
    "stopwatch",
]
