const url = 'https://api.example.com/transactions/credits/v1?limit=2&createDate[lte]=2024-09-01T00:00:00Z';
const options = {method: 'GET', headers: {Authorization: 'Basic REPLACE_BASIC_AUTH'}};

try {
  const response = await fetch(url, options);
  const data = await response.json();
  console.log(data);
} catch (error) {
  console.error(error);
}
