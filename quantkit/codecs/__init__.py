"""One address for each ggml type: layout, sizes, packing, unpacking, rescaling, and its fast twins."""
