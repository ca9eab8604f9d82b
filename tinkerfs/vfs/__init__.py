"""The file system without a kernel: names, attributes, bytes, removal."""
