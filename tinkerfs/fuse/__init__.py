"""Ways into the file system from outside: the kernel (FUSE) and fsspec."""
