"""Captured graphs in files: our own, and programs that torch.export saved."""
