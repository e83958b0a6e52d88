"""The encoder's inner loops: plain torch, numba on a CPU, Triton on a GPU."""
