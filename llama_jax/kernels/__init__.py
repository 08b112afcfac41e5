"""Attention for one platform each, every one tested against the reference in attention.py."""
