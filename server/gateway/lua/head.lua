function envoy_on_request(handle)
  if handle:headers():get(":method") == "HEAD" then
    handle:headers():replace(":method", "GET")
    handle:headers():replace("x-daybook-head", "1")
    handle:streamInfo():dynamicMetadata():set("daybook", "head", true)
  end
end

function envoy_on_response(handle)
  if handle:streamInfo():dynamicMetadata():get("daybook") == nil then
    return
  end
  for chunk in handle:bodyChunks() do
    chunk:setBytes("")
  end
end
