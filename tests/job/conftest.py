from oracle_files import chunks, imatrix, quantized, work  # noqa: F401
