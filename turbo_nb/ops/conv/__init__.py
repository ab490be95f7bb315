"""Convolutions and norms of Wan's VAE."""
