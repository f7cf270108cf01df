"""Sweeps: grids of runs, their tables and pages."""
