import http.client

conn = http.client.HTTPSConnection("api.example.com")

headers = {"Authorization": "Bearer REPLACE_BEARER_TOKEN"}

conn.request(
    "GET",
    "/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=2&sourceType=ai_chat&orderBy=amount&order=asc",
    headers=headers,
)

res = conn.getresponse()
data = res.read()

print(data.decode("utf-8"))
