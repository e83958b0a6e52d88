"""Checkpoints on a Hugging Face Hub: read by ranges, as if they lay in a folder."""
