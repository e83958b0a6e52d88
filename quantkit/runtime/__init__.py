"""The layer mathematics of DeepSeek-V2/V3/R1, and what runs it: streams of layers, and engines that generate."""
