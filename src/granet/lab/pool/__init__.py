"""Executors: many pieces of work on local processes, Ray or Slurm."""
