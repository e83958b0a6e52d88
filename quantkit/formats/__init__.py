"""Bytes <-> nouns: safetensors checkpoints in, GGUF models and imatrix files in and out; nothing is decided here."""
