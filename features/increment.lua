-- Adds weights to members of one statistic. Weights are base-2 logarithms, stored and given.
--
-- KEYS[1]  the statistic
-- ARGV[1]  the most members kept      ARGV[2]  lifetime in ms
-- then per member: its 8 bytes, log2 of the weight to add

local members = {}
for i = 3, #ARGV, 2 do members[#members + 1] = ARGV[i] end
local stored = redis.call('ZMSCORE', KEYS[1], unpack(members))
local added = {}
for i = 1, #members do
  local weight = tonumber(ARGV[2 * i + 2])
  if stored[i] then
    local old = tonumber(stored[i])
    local high, low = math.max(old, weight), math.min(old, weight)
    weight = high + math.log(1 + 2 ^ (low - high)) / math.log(2)
  end
  added[2 * i - 1] = string.format('%.17g', weight)
  added[2 * i] = members[i]
end
redis.call('ZADD', KEYS[1], unpack(added))
local extra = redis.call('ZCARD', KEYS[1]) - tonumber(ARGV[1])
if extra > 0 then redis.call('ZREMRANGEBYRANK', KEYS[1], 0, extra - 1) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
