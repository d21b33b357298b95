"""Chat data: files and hub sets -> rows -> tokens with an assistant-only mask -> batches."""
