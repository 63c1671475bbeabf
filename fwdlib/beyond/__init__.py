"""Methods past the core six notebooks: feedback alignment, and experiments with it."""
