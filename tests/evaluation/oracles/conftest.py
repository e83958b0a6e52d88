from oracle_files import chunks, imatrix, one_thread, plain, quantized, work  # noqa: F401
