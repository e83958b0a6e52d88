"""Recovery: what a finished file leaves free is tuned against the original, layer by layer."""
