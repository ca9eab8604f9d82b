"""Cached model of the account: runs, checkpoints, sessions, trash, mutations."""
