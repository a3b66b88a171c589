"""The Envoy gateway: the sources of its configuration, and the code that runs it."""
