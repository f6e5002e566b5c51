"""Whole servers as users start them, each by its engine's own command line."""
