"""Other programs that compute a file: what ours is checked against."""
