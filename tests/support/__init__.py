"""Shared parts of the tests: servers, drivers, clocks."""
