"""Attention over caches of keys and values, and what writes them."""
