"""The CUDA target: Inductor's Triton kernels, kept as cubins, and Triton kernels for onegraph's own ops."""
