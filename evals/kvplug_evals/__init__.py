"""Measuring what a policy costs in answers, through the engine that serves it."""
