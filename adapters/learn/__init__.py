"""How A and B are trained: gradient rules, perturbations, loss terms, frozen factors. One paper per module."""
