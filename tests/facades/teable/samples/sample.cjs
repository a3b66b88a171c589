const http = require('https');

const options = {
  method: 'GET',
  hostname: 'api.example.com',
  port: null,
  path: '/api/space/spcExampleStudio/billing/credit-history?month=2024-10&take=2&sourceType=ai_generation&orderBy=amount&order=desc',
  headers: {
    Authorization: 'Bearer REPLACE_BEARER_TOKEN'
  }
};

const req = http.request(options, function (res) {
  const chunks = [];

  res.on('data', function (chunk) {
    chunks.push(chunk);
  });

  res.on('end', function () {
    const body = Buffer.concat(chunks);
    console.log(body.toString());
  });
});

req.end();
