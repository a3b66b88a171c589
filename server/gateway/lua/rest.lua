-- Requests and answers of REST, before the transcoder sees the request and after it made the answer.
-- BOUND, the fields that paths bind, is defined in front of this file.

-- The transcoder ignores in a query what the path binds, but looks for it before it undoes
-- escapes, so the name is spelled out here.
local function spell_out(before, name)
  local plain = name:gsub("%%(%x%x)", function(code)
    return string.char(tonumber(code, 16))
  end)
  return BOUND[plain] and before .. plain
end

function envoy_on_request(handle)
  local headers = handle:headers()
  local allow = handle:metadata():get("allow")
  if allow then
    handle:respond({[":status"] = "405", allow = allow}, "")
    return
  end
  -- CONNECT has no path, and this is no proxy.
  local path = headers:get(":path")
  if not path then
    handle:respond({[":status"] = "404"}, "")
    return
  end
  headers:replace(":path", (path:gsub("([?&])([^=&]*)", spell_out)))
  -- The transcoder passes on unchanged what claims to be gRPC.
  if (headers:get("content-type") or ""):find("^application/grpc") then
    headers:remove("content-type")
  end
  -- The body of a GET means nothing, but the transcoder would let it override path and query.
  if headers:get(":method") == "GET" then
    local body = handle:body()
    if body then
      body:setBytes("")
      handle:headers():remove("content-length")
    end
  end
end

-- The status and the body of a vendor's error; nil for an error of the native API, and for one of
-- the gateway, whose body is finished. An error of the server carries both in headers. One that
-- gRPC itself raised is a google.rpc.Status and gets the vendor's body for its HTTP status.
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

-- Reduces {"name":[...]} to the array.
local function unwrap(body, name)
  local before = #name + 4
  if body and body:length() > before then
    body:setBytes(body:getBytes(before, body:length() - before - 1))
  end
end

-- Waiting for a body invalidates handles of headers, so they are fetched anew after it.
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
      -- A refused HEAD has the length of a body that it doesn't have.
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
