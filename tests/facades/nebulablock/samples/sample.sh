curl -X GET 'https://api.example.com/api/v1/users/credits/history?limit=2&offset=0' \
-H 'Authorization: Bearer REPLACE_BEARER_TOKEN'
