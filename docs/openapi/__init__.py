"""The OpenAPI documents of the REST APIs, generated from the contracts and the server's code.

`python -m docs.openapi` writes one document for the native API and one for each facade, as `make gen` does. The gateway
serves the files; the server doesn't need this package.

| module | content |
|---|---|
| `comments.py` | the comments of the contracts, which are the descriptions |
| `facts.py` | bounds, patterns and sets of values, from the server's code |
| `schemas.py` | the JSON Schema of a message |
| `errors.py` | the error responses of the native API and of a facade |
| `exchanges.py`, `examples/` | exchanges with a real gateway, which the tests repeat |
| `operations.py` | the operations of a method |
| `documents.py` | the documents |
"""
