import subprocess
import sys

import pecker_kernels as pk

PUBLIC = {
    "MaskError",
    "MaskedAdam",
    "NativeLibraryError",
    "PeckerKernelsError",
    "Piece",
    "SaliencyMask",
    "SaliencyScores",
    "ScoreError",
    "Shards",
    "SparseBackward",
    "adopt",
    "all_finite",
    "group_norm_silu",
    "kth_largest",
    "masked_adam_",
    "skip_weight_gradients",
}


def test_public_names_are_frozen():
    assert set(pk.__all__) == PUBLIC
    assert all(hasattr(pk, name) for name in PUBLIC)


def test_errors_are_value_errors():
    assert issubclass(pk.PeckerKernelsError, ValueError)
    for error in (pk.MaskError, pk.NativeLibraryError, pk.ScoreError):
        assert issubclass(error, pk.PeckerKernelsError)


def test_import_needs_torch_only():
    # torch's flop counter looks for triton by itself.
    code = (
        "import sys, torch, torch.utils.flop_counter\nbefore = set(sys.modules)\nimport pecker_kernels\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)\n"
        "print(sorted(m for m in new if not m.startswith('_') and m not in ('torch', 'numpy', 'pecker_kernels')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_import_and_cpu_calls_work_without_triton():
    code = (
        "import sys\nsys.modules['triton'] = None\nimport pecker_kernels, torch\n"
        "from pecker_kernels.mask import bits\n"
        "print(bits.popcount(bits.pack_bits(torch.ones(9, dtype=torch.bool))), sorted("
        "m for m in sys.modules if m.startswith('pecker_kernels.gpu.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "9 []"
