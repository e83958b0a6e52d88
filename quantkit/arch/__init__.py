"""Model families: names, shapes and metadata. One module each."""
