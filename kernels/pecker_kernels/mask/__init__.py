"""Which weights are salient, one bit each: packed bits, the mask of a model, its file, its cut over ranks."""
