"""Generic caches for metadata and file blocks; they do not depend on Tinker."""
