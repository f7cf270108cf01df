"""granet inside other people's training loops: one thin adapter for each stack, and checkpoints of shards."""
