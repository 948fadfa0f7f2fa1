"""Checkpoints in and out, and the one resident copy of every matrix."""
