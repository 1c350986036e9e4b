"""Row plans: which clips share a row, and in which order an epoch visits them."""
