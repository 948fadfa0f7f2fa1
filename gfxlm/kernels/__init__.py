"""Triton kernels and their launchers. No policy, no model: `ops` decides what runs."""
