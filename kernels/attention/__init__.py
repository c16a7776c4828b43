"""Attention backends, which `vit.kernels` registers by name."""
