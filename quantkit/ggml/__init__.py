"""The ggml library: binding, reference codecs, graphs."""
