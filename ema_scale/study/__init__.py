"""Many runs at once: studies and their report."""
