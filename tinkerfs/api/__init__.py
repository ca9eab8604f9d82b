"""Client of the Tinker API over HTTP, without file paths or caches."""
