"""The Triton kernels, one family of operations per file. `dispatch.triton_kernels` opens them by name."""
