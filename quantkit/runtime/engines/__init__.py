"""Ways to generate from a file: torch, one ggml graph, a GPU beside the CPU."""
