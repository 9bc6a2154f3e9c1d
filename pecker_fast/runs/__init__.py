"""The loop, one training, judging it, and the verbs over a run."""
