"""`granet bench`: engines side by side, layers, and training steps."""
