"""The only door to the disk: safe reading, checks of model folders, atomic writing."""
