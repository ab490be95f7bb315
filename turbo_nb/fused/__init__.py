"""Kernels put into diffusers' modules, and taken out again."""
