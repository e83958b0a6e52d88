"""Ways to compute routed experts."""
