"""Transfers of weights: into the cache, and to files in ordinary directories."""
