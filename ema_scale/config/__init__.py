"""The sections of a recipe, and how recipe files are merged. Torch-free."""
