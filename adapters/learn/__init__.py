"""How A and B learn: gradient rules, perturbations, terms of the loss, what is frozen. One paper per module."""
