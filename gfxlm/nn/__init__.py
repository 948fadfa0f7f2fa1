"""Modules that hold weights and call operations."""
