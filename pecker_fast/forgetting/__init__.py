"""The papers: losses, samplers, saliency, the methods and their update rules."""
