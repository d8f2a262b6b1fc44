"""Timing: variants of a model in turns, single pieces of work on a GPU, and a picture of the figures."""
