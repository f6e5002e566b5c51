"""The SGLang adapter, which is not built yet: no entry point names this package."""
