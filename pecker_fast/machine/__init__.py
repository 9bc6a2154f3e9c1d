"""What the run has under it: ranks, signals, hardware, and the names of the parts that time is measured by."""

from pecker_fast.machine.devices import Device, device_of
from pecker_fast.machine.hardware import doctor
from pecker_fast.machine.profile import part, recording
from pecker_fast.machine.signals import StopFlag, answering

__all__ = ["Device", "StopFlag", "answering", "device_of", "doctor", "part", "recording"]
