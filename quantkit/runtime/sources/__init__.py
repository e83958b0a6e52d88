"""Where the layers of a model come from: the original checkpoint, or a GGUF file in one of the ways to multiply it."""
