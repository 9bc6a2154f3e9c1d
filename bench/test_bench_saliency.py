"""Accumulating and contrasting scores, and choosing masks from them, on a CPU.

make bench
"""

import pytest
from harness import compare
from saliency_cases import saliency_case, saliency_cases


@pytest.mark.parametrize("case", saliency_cases(("sd15_sixteenth", "cifar10"), "sd15_sixteenth"), ids=str)
def test_saliency(benchmark, case):
    compare(benchmark, saliency_case(case))
