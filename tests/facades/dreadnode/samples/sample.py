import http.client

conn = http.client.HTTPSConnection("api.example.com")

headers = {"X-API-Key": "REPLACE_BEARER_TOKEN"}

conn.request(
    "GET",
    "/api/v1/org/example/credits/transactions?limit=2&transaction_type=purchase&transaction_type=inference",
    headers=headers,
)

res = conn.getresponse()
data = res.read()

print(data.decode("utf-8"))
