"""Whether to turn it on: what a model, a card and traffic have to gain, by arithmetic alone.

Nothing here starts an engine. A figure is a count of bytes (``bounds``), the engine's own count of
blocks (``capacity``) or a measurement that was published (``published``), and says which.
"""
