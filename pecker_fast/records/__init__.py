"""What a run writes while it goes: its folder, its checkpoints, its events."""
