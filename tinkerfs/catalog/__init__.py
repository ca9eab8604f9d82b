"""Catalogue: a read-through model of the account."""
