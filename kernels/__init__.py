"""The Triton kernels; installed as ``multistep_triton.kernels``. Imports nothing from ``multistep_triton.reference``.

``stream`` finds frames in memory, ``window`` computes windows and returns, ``gather`` copies rows, ``extend`` joins
them in one kernel and launches it, ``plan`` is what a launch is made of before there is any memory. Importing this
package imports no Triton; importing its modules does.
"""
