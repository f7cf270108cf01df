"""Compiled models in files: what a file holds, how it is checked, and how it runs."""
