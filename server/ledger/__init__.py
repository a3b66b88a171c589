"""The rules: pure and synchronous, without SQL, gRPC, clock or randomness of their own."""
