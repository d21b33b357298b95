"""Questions with written answers, and how likely a model finds each of them."""
