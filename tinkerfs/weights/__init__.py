"""The weights of checkpoints: signed URLs, archives, and reads of their members."""
