"""What a file is worth: perplexity and divergence from the original."""
