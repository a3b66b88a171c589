-- Sends the keys of a body to the server in headers, because the transcoder ignores unknown keys.
-- FREE, the set of fields with free keys (maps and Structs), is defined before this file.

-- No message has so many keys: a body beyond this limit has an unknown key.
local KEYS_BYTES_MAX = 4096
local DEPTH_MAX = 64

-- The letters of numbers, true, false and null.
local PLAIN = {[43] = true, [45] = true, [46] = true}
for _, range in ipairs({{48, 57}, {65, 90}, {97, 122}}) do
  for code = range[1], range[2] do
    PLAIN[code] = true
  end
end

local function escaped(character)
  return string.format("%%%02X", character:byte())
end

local function unescaped(code)
  return string.char(tonumber(code, 16))
end

-- Collects the keys of JSON in `found`. Fails if the text isn't JSON, even if the transcoder would
-- accept it: single quotes, keys without quotes, trailing commas. Reads each byte and each key only
-- once and stops at too many keys, because it blocks all other requests of its thread.
local function collect(text, found)
  local position, bytes, places = 1, 0, {}
  local read

  local function next_byte()
    local byte = text:byte(position)
    while byte == 32 or byte == 10 or byte == 13 or byte == 9 do
      position = position + 1
      byte = text:byte(position)
    end
    return byte
  end

  -- A string without its quotes, with its escapes.
  local function read_string()
    local from, last = position + 1, position
    local backslashes
    repeat
      last = text:find('"', last + 1, true)
      backslashes = 0
      while text:byte(last - 1 - backslashes) == 92 do
        backslashes = backslashes + 1
      end
    until backslashes % 2 == 0
    position = last + 1
    return text:sub(from, last - 1)
  end

  -- The entry of a key: `whole` is its path, `same` its path in camel case (order_by and orderBy are
  -- equal), and `inner` the prefix of the keys inside, or false if these are free.
  local function entry_of(path, written)
    local place = places[path]
    if not place then
      place = {}
      places[path] = place
    end
    local key = place[written]
    if not key then
      local name = written:sub(1, 64):gsub("\\u00(%x%x)", unescaped)
      local whole = path .. name:gsub("[^%w_]", escaped)
      key = {inner = not FREE[name] and whole .. ".", whole = whole, same = path .. name:gsub("_(%l)", string.upper)}
      place[written] = key
      if not found.same[key.same] then
        found.same[key.same] = true
        found[#found + 1] = whole
        bytes = bytes + #whole + 1
        if bytes > KEYS_BYTES_MAX then
          found[#found] = nil
          found.is_full = true
          error("too many keys")
        end
      end
    end
    return key
  end

  local function read_object(path, depth)
    local own = path and {}
    position = position + 1
    if next_byte() == 125 then
      position = position + 1
      return
    end
    while true do
      if next_byte() ~= 34 then
        error("no key")
      end
      local inner, written = nil, read_string()
      if path then
        local key = entry_of(path, written)
        inner = key.inner
        -- The paths of the contracts are shorter.
        if own[key.same] and #key.whole <= 256 then
          found.repeated = key.whole
        end
        own[key.same] = true
      end
      if next_byte() ~= 58 then
        error("no value")
      end
      position = position + 1
      read(inner, depth)
      local byte = next_byte()
      position = position + 1
      if byte == 125 then
        return
      elseif byte ~= 44 then
        error("no end")
      end
    end
  end

  local function read_array(path, depth)
    position = position + 1
    if next_byte() == 93 then
      position = position + 1
      return
    end
    while true do
      read(path, depth)
      local byte = next_byte()
      position = position + 1
      if byte == 93 then
        return
      elseif byte ~= 44 then
        error("no end")
      end
    end
  end

  read = function(path, depth)
    local byte = next_byte()
    if depth > DEPTH_MAX then
      error("too deep")
    elseif byte == 123 then
      read_object(path, depth + 1)
    elseif byte == 91 then
      read_array(path, depth + 1)
    elseif byte == 34 then
      read_string()
    elseif PLAIN[byte] then
      while PLAIN[text:byte(position)] do
        position = position + 1
      end
    else
      error("no value")
    end
  end

  read("", 0)
  if next_byte() then
    error("trailing text")
  end
end

function envoy_on_request(handle)
  local headers = handle:headers()
  if headers:get(":path"):sub(1, 4) ~= "/v1/" or headers:get(":method") == "GET" then
    return
  end
  local body = handle:body()
  if not body or body:length() == 0 then
    return
  end
  local found = {same = {}}
  local is_json = pcall(collect, body:getBytes(0, body:length()), found)
  headers = handle:headers()
  if not is_json and not found.is_full then
    headers:replace("x-daybook-body-malformed", "1")
    return
  end
  headers:replace("x-daybook-body-keys", table.concat(found, ","))
  if found.repeated then
    headers:replace("x-daybook-body-repeated", found.repeated)
  end
end
