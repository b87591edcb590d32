"""Training of verifiers with the pairwise loss."""
