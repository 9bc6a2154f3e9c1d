"""What the run has under it: ranks, signals, hardware, and the names of the parts that time is measured by."""
