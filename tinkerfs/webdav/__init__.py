"""WebDAV adapter: the file system over HTTP, and a page for each directory."""
