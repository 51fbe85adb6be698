-- One holder at a time, and a token that only rises.
-- KEYS: 1 the lease, 2 the highest token. ARGV: 1 take, renew or give; 2 milliseconds; 3 token;
-- of take: the highest token that the registry has seen, for a Redis that has lost its data.
-- Answers the token that holds the lease now for the caller, 0 where that is not the caller.
local holder = redis.call('GET', KEYS[1])
local highest = tonumber(redis.call('GET', KEYS[2]) or '0')
local token = tonumber(ARGV[3])
if ARGV[1] == 'take' then
  if holder then
    return 0
  end
  if token > highest then
    redis.call('SET', KEYS[2], ARGV[3])
  end
  token = redis.call('INCR', KEYS[2])
  redis.call('SET', KEYS[1], string.format('%.0f', token), 'PX', ARGV[2])
  return token
end
if ARGV[1] == 'give' then
  if holder == ARGV[3] then
    redis.call('DEL', KEYS[1])
  end
  return 0
end
-- A lease that has run out may be renewed as long as nobody has had it since.
if holder == ARGV[3] or (not holder and highest == token) then
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2])
  return token
end
return 0
