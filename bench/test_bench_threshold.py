"""How long the exact threshold of 32 M scores takes on a CPU beside torch's own selections.

make bench
"""

import pytest
from flat_cases import threshold_case, threshold_cases
from harness import compare


@pytest.mark.parametrize("case", threshold_cases(), ids=str)
def test_threshold(benchmark, case):
    compare(benchmark, threshold_case(case))
