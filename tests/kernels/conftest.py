"""`level`: the test runs once at each instruction level of the C++ kernels that this machine has."""

import pytest
from pecker_kernels import native as cpu


@pytest.fixture(params=range(3), ids=cpu.LEVELS)
def level(request):
    before = cpu.cpu_level()
    if request.param > cpu.cpu_level_max():
        pytest.skip("this machine lacks the instruction set")
    cpu.set_cpu_level(request.param)
    yield request.param
    cpu.set_cpu_level(before)
