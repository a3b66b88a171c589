"""The native API: parse, one use-case call, render."""
