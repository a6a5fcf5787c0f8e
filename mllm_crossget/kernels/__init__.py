"""Kernels for GPUs, in Triton. Each of them answers as the torch code in ``ops`` does, which stays the oracle."""
