"""Products of routed experts in C, compiled for the machine that they run on."""
