"""The use cases, one class per resource: authorise, load, apply the rules, save."""
