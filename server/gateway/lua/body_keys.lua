-- Sends the keys of a body to the server in headers, because the transcoder ignores unknown keys.
-- FREE, the set of fields whose keys are arbitrary (maps and Structs), is defined before this file.

-- No message has so many keys: a body beyond this limit has an unknown key.
local KEYS_BYTES_MAX = 4096
local DEPTH_MAX = 64

local QUOTE, BACKSLASH, COLON, COMMA = 34, 92, 58, 44
local OPEN_BRACE, CLOSE_BRACE, OPEN_BRACKET, CLOSE_BRACKET = 123, 125, 91, 93
local SPACE, LINE_FEED, CARRIAGE_RETURN, TAB = 32, 10, 13, 9

-- The characters of numbers, true, false and null: + - . and letters and digits.
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
  local position, bytes, entries_by_prefix = 1, 0, {}
  local read

  local function next_byte()
    local byte = text:byte(position)
    while byte == SPACE or byte == LINE_FEED or byte == CARRIAGE_RETURN or byte == TAB do
      position = position + 1
      byte = text:byte(position)
    end
    return byte
  end

  -- A string without its quotes, with its escapes. Fails at the end of the text, where `last` is nil.
  local function read_string()
    local from, last = position + 1, position
    local backslashes
    repeat
      last = text:find('"', last + 1, true)
      backslashes = 0
      while text:byte(last - 1 - backslashes) == BACKSLASH do
        backslashes = backslashes + 1
      end
    until backslashes % 2 == 0
    position = last + 1
    return text:sub(from, last - 1)
  end

  -- The entry of a key, cached by the prefix of its object and its text. `path` is the key's path,
  -- `canonical` its path in camel case, in which order_by and orderBy are equal, and `prefix` that of
  -- the keys inside its value, or false if these are arbitrary.
  local function entry_of(prefix, text_of_key)
    local entries = entries_by_prefix[prefix]
    if not entries then
      entries = {}
      entries_by_prefix[prefix] = entries
    end
    local entry = entries[text_of_key]
    if not entry then
      local name = text_of_key:sub(1, 64):gsub("\\u00(%x%x)", unescaped)
      local path = prefix .. name:gsub("[^%w_]", escaped)
      local canonical = prefix .. name:gsub("_(%l)", string.upper)
      entry = {prefix = not FREE[name] and path .. ".", path = path, canonical = canonical}
      entries[text_of_key] = entry
      if not found.canonical[canonical] then
        found.canonical[canonical] = true
        found[#found + 1] = path
        bytes = bytes + #path + 1
        if bytes > KEYS_BYTES_MAX then
          found[#found] = nil
          found.is_full = true
          error("too many keys")
        end
      end
    end
    return entry
  end

  local function read_object(prefix, depth)
    local own = prefix and {}
    position = position + 1
    if next_byte() == CLOSE_BRACE then
      position = position + 1
      return
    end
    while true do
      if next_byte() ~= QUOTE then
        error("no key")
      end
      local inner_prefix, text_of_key = nil, read_string()
      if prefix then
        local entry = entry_of(prefix, text_of_key)
        inner_prefix = entry.prefix
        -- A longer path is in no contract, so it is refused as unknown.
        if own[entry.canonical] and #entry.path <= 256 then
          found.repeated = entry.path
        end
        own[entry.canonical] = true
      end
      if next_byte() ~= COLON then
        error("no value")
      end
      position = position + 1
      read(inner_prefix, depth)
      local byte = next_byte()
      position = position + 1
      if byte == CLOSE_BRACE then
        return
      elseif byte ~= COMMA then
        error("no end")
      end
    end
  end

  local function read_array(prefix, depth)
    position = position + 1
    if next_byte() == CLOSE_BRACKET then
      position = position + 1
      return
    end
    while true do
      read(prefix, depth)
      local byte = next_byte()
      position = position + 1
      if byte == CLOSE_BRACKET then
        return
      elseif byte ~= COMMA then
        error("no end")
      end
    end
  end

  read = function(prefix, depth)
    local byte = next_byte()
    if depth > DEPTH_MAX then
      error("too deep")
    elseif byte == OPEN_BRACE then
      read_object(prefix, depth + 1)
    elseif byte == OPEN_BRACKET then
      read_array(prefix, depth + 1)
    elseif byte == QUOTE then
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
  local found = {canonical = {}}
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
