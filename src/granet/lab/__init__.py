"""The laboratory: many runs side by side, on this machine or on a cluster, and what they say together."""
