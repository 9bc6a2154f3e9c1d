"""One optimizer step on a CPU beside torch's fused Adam and what unlearning code does with masks.

make bench
"""

import pytest
from adam_cases import adam_case, adam_cases
from harness import compare


@pytest.mark.parametrize("case", adam_cases(("sd15_sixteenth", "cifar10", "flat")), ids=str)
def test_step(benchmark, case):
    compare(benchmark, adam_case(case))
