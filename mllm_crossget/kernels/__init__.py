"""Compiled kernels: Triton for GPUs, Numba for CPUs. Each has the same results as the torch code in ``ops``, its
reference."""
