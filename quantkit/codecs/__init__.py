"""Every ggml type at one address: `types` knows the sizes, `registry.codec(name)` everything else.

iq1 iq2 iq3 kquants plain hold, for each type, the layout of its bytes, how they are packed and taken apart, where the
scales stand, and what the encoder chooses by. numba_decode and triton_decode hold the fast twins of the decoders.
"""
