"""Model classes this package adds to transformers' Auto classes."""
