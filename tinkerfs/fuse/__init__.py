"""The kernel's side: FUSE operations, the libfuse binding, and the session of a mount."""
