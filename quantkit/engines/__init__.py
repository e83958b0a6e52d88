"""Other engines, asked in processes of their own: what they really compute from a file."""
