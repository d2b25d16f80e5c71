"""A recipe's run, from the first check to the final model."""
