"""The Triton kernels; installed as ``multistep_triton.kernels``. Imports nothing from ``multistep_triton.reference``.

``stream`` finds frames in memory, ``window`` computes windows and returns, ``gather`` copies rows, ``extend`` joins
them in one kernel, ``plan`` is what a launch is made of before there is any memory, ``launch`` launches. Importing
this package imports no Triton; importing its modules does.
"""
