"""Engines as evaluations use them: waves of requests in, answers and what they cost out."""
