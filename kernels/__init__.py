"""The Triton kernels, one file per operation; installed as ``multistep_triton.kernels``.

Imports nothing from ``multistep_triton.reference``.
"""
