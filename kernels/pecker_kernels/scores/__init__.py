"""How much each weight carries the concept: scores over backward passes, exact thresholds, the choice of the best."""
