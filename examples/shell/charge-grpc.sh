#!/bin/sh
# Creates an account, grants and charges credits, and prints the history over gRPC: charge-grpc.sh ACCOUNT_ID
set -eu

account_id=$1
address=${DAYBOOK_ADDRESS:-127.0.0.1:50051}
key=${DAYBOOK_KEY:-demo-dreadnode.public}

# call METHOD JSON; the server reflects its contracts, so buf needs no files.
call() {
  buf curl --protocol grpc --http2-prior-knowledge -H "authorization: Bearer $key" \
    -d "$2" "http://$address/daybook.v1.Ledger/$1"
}

call CreateAccount "{\"accountId\": \"$account_id\", \"account\": {\"kind\": \"USER\"}, \"requestId\": \"$account_id-1\"}" >/dev/null
call CreateTransaction "{\"parent\": \"accounts/$account_id\", \"requestId\": \"$account_id-2\",
  \"transaction\": {\"kind\": \"GRANT\", \"category\": \"purchase\", \"amount\": \"20\"}}" >/dev/null
call CreateTransaction "{\"parent\": \"accounts/$account_id\", \"requestId\": \"$account_id-3\",
  \"transaction\": {\"kind\": \"CHARGE\", \"category\": \"inference\", \"amount\": \"-0.25\"}}" >/dev/null
call ListTransactions "{\"parent\": \"accounts/$account_id\"}" |
  jq -r '.transactions[] | "\(.kind) \(.amount) \(.balanceAfter)"'
