"""Two processes over gloo on the CPU."""
