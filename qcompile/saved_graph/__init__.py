"""Graphs in files: captured ones, programs that torch.export saved, and the cache of what was compiled."""
