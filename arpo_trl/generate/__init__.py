"""Text out: predictions, scores, chat."""
