"""Mechanisms that keep what was fetched; they know nothing of Tinker."""
