"""Attention backends, registered by name in `vit.kernels`."""
