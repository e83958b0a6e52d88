"""How kernels are compiled for the CPU: by numba, which brings LLVM in its wheel, once a machine (it caches on disk).

Kernels that call each other stand in one file: numba compiles a cached kernel anew when its own file changes, not when
another does.
"""

import numba
import numpy as np

from quantkit.container import writable_caches

KEPT = writable_caches()
F = np.float32
BIG = F(3e38)  # infinities are outside fastmath's promises
jit = numba.njit(fastmath=True, nogil=True, cache=KEPT, error_model="numpy", boundscheck=False)
# What kernels call is inlined: of several copies the loader takes the one that this process compiled or read first, and
# under fastmath they differ in the last bit: a first run would give other bytes than those after it.
part = numba.njit(fastmath=True, nogil=True, cache=KEPT, error_model="numpy", boundscheck=False, forceinline=True)
