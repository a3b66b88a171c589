"""The Envoy gateway: the parts that its configuration is generated from, and what runs it."""
