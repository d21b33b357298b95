"""What a run will take, before anything is loaded (`ema plan`)."""
