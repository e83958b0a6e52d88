"""The command line: it only translates. Each command is one stage, file to file; `make` runs them all."""
