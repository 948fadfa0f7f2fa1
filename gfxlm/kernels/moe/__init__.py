"""Kernels of the mixture of experts: the router, and the experts' gated MLPs for few rows and for many."""
