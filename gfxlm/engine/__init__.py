"""Turns tokens into tokens: requests, caches, sampling, text."""
