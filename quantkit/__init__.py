"""quantkit: dynamic low-bit GGUF files of DeepSeek-R1 and its family, from the FP8 checkpoint."""

__version__ = "0.1.0"
