"""What comes out: diffusers folders, single files, deltas."""
