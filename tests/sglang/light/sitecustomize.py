"""Every process of these tests imports SGLang: a third of that time is spent on what none needs.

Garbage is collected among a million new objects that all stay, and transformers loads
scikit-learn for a way to speculate.
"""

import gc
import sys

gc.set_threshold(50_000, 20, 100)
sys.modules["sklearn"] = None  # type: ignore[assignment]
