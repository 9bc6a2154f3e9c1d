"""The cases of the CPU suites on a GPU, at full size: CUDA events, caches flushed before each run; skipped without CUDA.

python -m pytest bench/test_gpu_kernels.py --benchmark-json=bench/results/gpu.json
"""

import pytest
import torch
from adam_cases import adam_case, adam_cases
from flat_cases import BIT_CASES, ThresholdCase, bit_case, threshold_case, threshold_cases
from harness import compare
from saliency_cases import saliency_case, saliency_cases
from shapes import SD15_WEIGHTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SDXL_WEIGHTS = 2_567_463_684  # beyond what topk and sort take
THRESHOLDS = [
    *threshold_cases(), *threshold_cases(SD15_WEIGHTS), ThresholdCase("half-normal", 0.1, SDXL_WEIGHTS),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_cache():
    """A case may need most of the memory."""
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("case", adam_cases(("sd15", "cifar10", "flat")), ids=str)
def test_step(benchmark, case):
    compare(benchmark, adam_case(case, "cuda"))


@pytest.mark.parametrize("case", THRESHOLDS, ids=str)
def test_threshold(benchmark, case):
    compare(benchmark, threshold_case(case, "cuda"))


@pytest.mark.parametrize("case", saliency_cases(("sd15",), "sd15"), ids=str)
def test_saliency(benchmark, case):
    compare(benchmark, saliency_case(case, "cuda"))


@pytest.mark.parametrize("case", BIT_CASES, ids=str)
def test_bits(benchmark, case):
    compare(benchmark, bit_case(case, "cuda"))
