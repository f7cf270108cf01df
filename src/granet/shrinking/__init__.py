"""Cutting dead channels out of a network, so that any hardware gains from them."""
