"""Prompts become embeddings."""
