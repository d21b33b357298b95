"""Which safe rows to mix in (`ema select`)."""
