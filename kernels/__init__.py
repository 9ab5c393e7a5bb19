"""The Triton kernels; installed as ``multistep_triton.kernels``. Imports no other implementation.

``windows`` is the kernel of a call's first launch, ``rows`` that of the second one; ``launch`` makes their arguments.
Importing this package imports no Triton; importing its modules does.
"""
