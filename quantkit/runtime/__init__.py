"""The layer mathematics of DeepSeek-V2/V3/R1, and what runs it: layer streaming and the hybrid runtime."""
