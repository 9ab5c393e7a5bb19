"""The Triton kernels, installed as ``multistep_triton.kernels``. Imports no other implementation.

``windows`` has the kernel of a call's first launch, ``rows`` that of its second; ``launch`` makes their arguments.
Importing this package imports no Triton; importing its modules does.
"""
