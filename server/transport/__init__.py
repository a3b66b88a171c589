"""The parts that all calls share: credentials, errors, page tokens, validation, observation."""
