"""The CPU engine: sparse kernels, compiled inference and accelerated training."""
