"""The shapes that every kernel is tried on."""
