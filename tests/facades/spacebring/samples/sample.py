import http.client

conn = http.client.HTTPSConnection("api.example.com")

headers = {"spacebring-network-id": "REPLACE_NETWORK_ID", "Authorization": "Bearer REPLACE_BEARER_TOKEN"}

conn.request("GET", "/transactions/credits/v1?limit=2&createDate[gte]=2024-08-01T00:00:00Z", headers=headers)

res = conn.getresponse()
data = res.read()

print(data.decode("utf-8"))
