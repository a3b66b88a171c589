#!/bin/sh
# Creates an account, grants and charges credits, and prints the history over REST: charge.sh ACCOUNT_ID
set -eu

account_id=$1
gateway=${GATEWAY:-http://127.0.0.1:8080}
key=${DAYBOOK_KEY:-demo-dreadnode.public}

# post IDEMPOTENCY_KEY PATH JSON
post() {
  curl --silent --show-error --fail-with-body --retry 5 --output /dev/null \
    -H "Authorization: Bearer $key" -H "Idempotency-Key: $1" -H 'Content-Type: application/json' \
    -d "$3" "$gateway/v1/$2"
}

post "$account_id-1" "accounts?accountId=$account_id" '{"kind": "USER"}'
post "$account_id-2" "accounts/$account_id/transactions" '{"kind": "GRANT", "category": "purchase", "amount": "20"}'
post "$account_id-3" "accounts/$account_id/transactions" '{"kind": "CHARGE", "category": "inference", "amount": "-0.25"}'
curl --silent --show-error --fail-with-body --retry 5 \
  -H "Authorization: Bearer $key" "$gateway/v1/accounts/$account_id/transactions" |
  jq -r '.transactions[] | "\(.kind) \(.amount) \(.balanceAfter)"'
