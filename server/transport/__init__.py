"""What every call shares: credentials, errors, page tokens, validation, observation."""
