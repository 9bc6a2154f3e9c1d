"""Packing, unpacking, counting and applying 32 M mask bits on a CPU.

make bench
"""

import pytest
from flat_cases import BIT_CASES, bit_case
from harness import compare


@pytest.mark.parametrize("case", BIT_CASES, ids=str)
def test_bits(benchmark, case):
    compare(benchmark, bit_case(case))
