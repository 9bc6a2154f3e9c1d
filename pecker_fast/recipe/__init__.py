"""What a run is asked to do: the keys, their YAML, errors in one line, the shipped recipes and prompt texts."""
