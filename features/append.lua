-- Appends one or more events of one user to the packed sequence (layout: features/sequence.py).
--
-- KEYS[1]  the sequence               KEYS[2]  the name of the user's tier
-- ARGV[1]  the most events kept       ARGV[2]  lifetime in ms
-- then per event, in order:
--   fence   16 bytes: topic epoch u32, partition u32, offset f64
--   record  12 bytes (narrow) or 24 (wide)
--   the oldest timestamp kept
-- Returns per event: 1 or 0 (applied, or seen before) and the sequence just after it; last, the tier.
--
-- All events of one user in a batch come in one call, so they are applied together or not at all:
-- with a call each, a first one that fails (out of memory, script not loaded) before a second one
-- that succeeds would be fenced off for ever when the batch is repeated.
-- Ids are only ever bytes here: a Lua number is a double and rounds past 2^53.

local byte, char, sub, unpack_ = string.byte, string.char, string.sub, struct.unpack
local NARROW, WIDE = 1, 2
local WIDTH = {12, 24}
local TIMESTAMP_AT = {4, 16}
local MAX_FENCES = 255

local function widen(record)
  local high = byte(record, 12)
  return sub(record, 1, 4) .. '\0\0\0\0'
    .. sub(record, 9, 11) .. char(high % 64) .. '\0\0\0\0'
    .. sub(record, 5, 8)
    .. char((high - high % 64) / 64) .. '\0\0\0'
end

local format, fences, body = NARROW, '', ''
local value = redis.pcall('GET', KEYS[1])
if type(value) ~= 'string' then value = '' end -- none, or a key of another type
local stored_format, fence_count = byte(value, 1, 2)
-- A value that is none of ours is written over: an error here would hold up its partition for
-- ever, and the log can rebuild the sequence.
if WIDTH[stored_format or 0] and fence_count then
  local start = 3 + 16 * fence_count
  local length = #value - start + 1
  if length >= 0 and length % WIDTH[stored_format] == 0 then
    format, fences, body = stored_format, sub(value, 3, start - 1), sub(value, start)
  end
end

local max_events = tonumber(ARGV[1])
local changed = false
local answer = {}
for i = 3, #ARGV, 3 do
  local fence = ARGV[i]
  local partition = sub(fence, 5, 8)
  local at, seen = nil, false
  for j = 1, #fences, 16 do
    if sub(fences, j + 4, j + 7) == partition then
      at = j
      seen = sub(fences, j, j + 3) == sub(fence, 1, 4)
        and unpack_('<d', fence, 9) <= unpack_('<d', fences, j + 8)
      break
    end
  end
  if not seen then
    local record = ARGV[i + 1]
    if format == NARROW and #record == WIDTH[WIDE] then
      body = string.gsub(body, '............', widen)
      format = WIDE
    elseif format == WIDE and #record == WIDTH[NARROW] then
      record = widen(record)
    end
    local width, timestamp_at = WIDTH[format], TIMESTAMP_AT[format]
    local first = math.max(1, 1 + #body - (max_events - 1) * width)
    local oldest = tonumber(ARGV[i + 2])
    while first <= #body and unpack_('<I4', body, first + timestamp_at) < oldest do
      first = first + width
    end
    body = sub(body, first) .. record
    if at then
      fences = sub(fences, 1, at - 1) .. fence .. sub(fences, at + 16)
    else
      if #fences >= 16 * MAX_FENCES then fences = sub(fences, 17) end
      fences = fences .. fence
    end
    value = char(format, #fences / 16) .. fences .. body
    changed = true
  end
  answer[#answer + 1] = seen and 0 or 1
  answer[#answer + 1] = value
end
if changed then redis.call('SET', KEYS[1], value, 'PX', ARGV[2]) end
local tier = redis.pcall('GET', KEYS[2])
answer[#answer + 1] = type(tier) == 'string' and tier -- false is null
return answer
