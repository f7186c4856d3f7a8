"""Blocks and their parts: tensors in, tensors out. No config, no depth, no cache of their own."""
