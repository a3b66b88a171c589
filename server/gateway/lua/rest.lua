-- Rewrites REST requests before the transcoder, and responses after it.
-- BOUND, the set of fields that paths bind, is defined before this file.

-- Unescapes the name of a query parameter that the path binds. The transcoder ignores such a
-- parameter, but compares its name before it undoes escapes.
local function unescape_bound(separator, name)
  local plain = name:gsub("%%(%x%x)", function(code)
    return string.char(tonumber(code, 16))
  end)
  return BOUND[plain] and separator .. plain
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local allow = handle:metadata():get("allow")
  if allow then
    handle:respond({[":status"] = "405", allow = allow}, "")
    return
  end
  -- Only CONNECT has no path. The gateway is not a proxy.
  local path = headers:get(":path")
  if not path then
    handle:respond({[":status"] = "404"}, "")
    return
  end
  headers:replace(":path", (path:gsub("([?&])([^=&]*)", unescape_bound)))
  -- The transcoder would pass on a request with the content type of gRPC unchanged.
  if (headers:get("content-type") or ""):find("^application/grpc") then
    headers:remove("content-type")
  end
  -- A GET has no body, but the transcoder would let it override path and query.
  if headers:get(":method") == "GET" then
    local body = handle:body()
    if body then
      body:setBytes("")
      handle:headers():remove("content-length")
    end
  end
end

-- The status and the body of a vendor's error. The server's errors have both in headers. An error
-- that gRPC itself raised is a google.rpc.Status; it gets the vendor's body for its HTTP status.
-- Returns nil for errors of the native API, and for the gateway's own, whose body is complete.
local function vendor_error(handle, status, text)
  local headers = handle:headers()
  local body = headers:get("x-error-body")
  if body then
    return headers:get("x-error-status") or status, body
  end
  local errors = handle:metadata():get("errors")
  if errors and (text == "" or text:find('^{"code":%d+,"message"')) then
    local error = errors[status] or errors["500"]
    return error.status, error.body
  end
end

-- Replaces {"name":[...]} by the array.
local function unwrap(body, name)
  local prefix = #name + 4
  if body and body:length() > prefix then
    body:setBytes(body:getBytes(prefix, body:length() - prefix - 1))
  end
end

-- Waiting for a body invalidates the handles of headers, so they are fetched again afterwards.
function envoy_on_response(handle)
  local status = handle:headers():get(":status")
  local array = handle:metadata():get("array")
  if status == "200" and array then
    unwrap(handle:body(), array)
  end
  if status >= "400" then
    local body = handle:body()
    if body then
      local vendor_status, vendor_body = vendor_error(handle, status, body:getBytes(0, body:length()))
      if vendor_status then
        status = vendor_status
        handle:headers():replace(":status", status)
        handle:headers():replace("content-type", "application/json")
        body:setBytes(vendor_body)
      end
    else
      -- The response to a refused HEAD has a content-length without a body.
      handle:headers():remove("content-length")
    end
  end
  local headers = handle:headers()
  if status == "401" and headers:get("www-authenticate") == nil then
    headers:add("www-authenticate", handle:metadata():get("challenge") or "Bearer")
  end
  if status == "429" and headers:get("retry-after") == nil then
    headers:add("retry-after", "1")
  end
end
