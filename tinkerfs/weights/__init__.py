"""The bytes of a checkpoint: archives and the signed URLs that lead to them."""
