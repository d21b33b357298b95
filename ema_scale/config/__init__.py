"""The sections of a recipe, how recipe files are merged, and what each field means. Torch-free."""
