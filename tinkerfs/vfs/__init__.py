"""Virtual file system, independent of FUSE."""
