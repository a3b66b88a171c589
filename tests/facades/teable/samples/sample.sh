curl --request GET \
  --url 'https://api.example.com/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=2&sourceType=ai_chat&orderBy=createdTime&order=desc' \
  --header 'Authorization: Bearer REPLACE_BEARER_TOKEN'
