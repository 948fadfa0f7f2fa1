"""Small kernels: norms, activations, selection, sampling, writing a window."""
