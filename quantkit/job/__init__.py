"""The commands' work from start to end, and what they leave in a folder."""
