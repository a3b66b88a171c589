const url = 'https://api.example.com/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=2&sourceType=app_generation&orderBy=createdTime&order=asc';
const options = {method: 'GET', headers: {Authorization: 'Bearer REPLACE_BEARER_TOKEN'}};

try {
  const response = await fetch(url, options);
  const data = await response.json();
  console.log(data);
} catch (error) {
  console.error(error);
}
