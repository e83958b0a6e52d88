"""Families of models: their numbers, tensors, metadata and tokenizers; and how one is opened."""
