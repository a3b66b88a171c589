curl --request GET \
  --url 'https://api.example.com/transactions/credits/v1?limit=2&createDate%5Bgte%5D=2024-08-01T00%3A00%3A00Z&createDate%5Blte%5D=2024-09-01T00%3A00%3A00Z' \
  --header 'Authorization: Basic REPLACE_BASIC_AUTH'
