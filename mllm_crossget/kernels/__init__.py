"""Compiled kernels: Triton for GPUs, Numba for CPUs. Their reference is the torch code in ``ops``."""
