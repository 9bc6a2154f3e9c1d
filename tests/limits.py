"""When a test calls something hung: far above ten times what a quiet machine takes, since others may work on it."""

HUNG_S = 1200.0
ENDED_S = 150.0  # until all ranks have ended: 15 s on a quiet machine is what users are promised
