"""Data sets that `pretrain` reads, and pictures of shapes that are drawn here. `train` never looks at either."""
