"""From weights and what calibration knows of their inputs to packed ggml blocks."""
