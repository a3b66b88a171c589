import http.client

conn = http.client.HTTPSConnection("api.example.com")

headers = {"Authorization": "Bearer REPLACE_BEARER_TOKEN"}

conn.request("GET", "/users/credits/history?limit=2&offset=0", headers=headers)

res = conn.getresponse()
data = res.read()

print(data.decode("utf-8"))
