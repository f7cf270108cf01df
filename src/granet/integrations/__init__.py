"""granet inside other people's training loops: one thin adapter a stack, each with an extra of its own.

Adapters call a `Sparsifier` at the right moments and save its state with the run; they decide nothing. See
docs/integrations.md for the stacks that need none.
"""
