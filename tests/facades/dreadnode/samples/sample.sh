curl --request GET \
  --url 'https://api.example.com/api/v1/org/example/credits/transactions?limit=2' \
  --header 'Authorization: Bearer REPLACE_BEARER_TOKEN'
