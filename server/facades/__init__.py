"""The documented REST APIs, one file per vendor: parse, one use-case call, render."""
