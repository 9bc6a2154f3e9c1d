"""What a recipe names, loaded."""
