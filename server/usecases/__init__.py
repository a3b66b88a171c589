"""What can be done, one class per resource: authorise, load, apply the rule, save."""
