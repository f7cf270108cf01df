"""Pruning plasticity: how well a network recovers from pruning, through training."""
