"""Denoisers and what they are made of: schedules, text models, adapters, single files, architectures."""
