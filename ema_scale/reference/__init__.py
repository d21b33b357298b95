"""The frozen reference: one interface, several ways to run it."""
