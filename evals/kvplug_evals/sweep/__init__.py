"""``kvplug eval``: settings, run one after another, resumed where they stopped, and compared."""
