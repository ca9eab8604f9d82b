"""The Tinker API over HTTP: no paths, no cache. Importing this package does not import httpx."""
