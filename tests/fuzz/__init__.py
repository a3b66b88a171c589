"""Hostile input against real processes: a server and its gateway must refuse it, stay up and keep their size.

`python -m tests.fuzz` (`make fuzz`) starts `daybook up` and sends seeded inputs of six kinds: messages of every RPC
method, REST requests, and byte streams of HTTP/1 and HTTP/2 at both ports. An input fails if the server or the gateway
takes the blame (5xx, INTERNAL and similar), does not answer in time, or leaves a connection open. After each batch both
processes must be alive and ready, and answer a valid call; at the end file descriptors and memory must have come back.
"""
