-- Requests for wrk. Arguments after `--`: how many wallets, the share of balance reads in percent, operations per request,
-- how many wallets are paid by transfers (0: none), and how many holds are open at a time (0: none are made). Wallet n is called w00001, w00002 ...; every operation is a DEPOSIT of 1 under a
-- random UUID, or a TRANSFER of 1 to one of the wallets that are paid, or in turn a HOLD of 1 and the capture of the oldest that is
-- open. With a WALLET_KEY in the environment, each request presents it. More than one operation goes as a bulk request. Prints one line of JSON at the end.

local random, format, concat = math.random, string.format, table.concat
local wallets, reads, size, payees, holds
local held, first, last = {}, 1, -1 -- the first request is only looked at by wrk, and not sent
local threads = 0
local key = os.getenv("WALLET_KEY")
local head = " HTTP/1.1\r\nHost: 127.0.0.1\r\n" .. (key and "Authorization: Bearer " .. key .. "\r\n" or "")

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(arguments)
  wallets, reads, size = tonumber(arguments[1]), tonumber(arguments[2]), tonumber(arguments[3])
  payees, holds = tonumber(arguments[4]), tonumber(arguments[5])
  math.randomseed(os.time() * 1000 + number * 7919)
  for _ = 1, 10 do random() end
end

local function wallet()
  return format("w%05d", wallets == 1 and 1 or random(1, wallets))
end

local function uuid()
  return format("%08x-%04x-4%03x-8%03x-%06x%06x", random(0, 0xffffffff), random(0, 0xffff), random(0, 0xfff),
    random(0, 0xfff), random(0, 0xffffff), random(0, 0xffffff))
end

local function post(path, body)
  return "POST " .. path .. head .. "Content-Type: application/json\r\nContent-Length: "
    .. #body .. "\r\n\r\n" .. body
end

local function transfer()
  local payee = random(1, payees)
  local payer = (payee + random(1, wallets - 1) - 1) % wallets + 1
  return post(format("/api/v1/wallets/w%05d/operation", payer), '{"operation_uuid":"' .. uuid()
    .. '","operation_type":"TRANSFER","amount":1,"counterparty_uuid":"' .. format("w%05d", payee) .. '"}')
end

local function hold_or_capture()
  local name, rest = uuid(), '","operation_type":"HOLD","amount":1}'
  if last - first + 1 < holds then
    last = last + 1
    held[last] = name
  else
    rest = '","operation_type":"WITHDRAW","amount":1,"hold_uuid":"' .. held[first] .. '"}'
    held[first] = nil
    first = first + 1
  end
  return post("/api/v1/wallets/" .. wallet() .. "/operation", '{"operation_uuid":"' .. name .. rest)
end

function request()
  if holds > 0 then
    return hold_or_capture()
  end
  if payees > 0 then
    return transfer()
  end
  if reads > 0 and random(1, 100) <= reads then
    return "GET /api/v1/wallets/" .. wallet() .. head .. "\r\n"
  end
  if size == 1 then
    return post("/api/v1/wallets/" .. wallet() .. "/operation",
      '{"operation_uuid":"' .. uuid() .. '","operation_type":"DEPOSIT","amount":1}')
  end
  local items, rest = {}, uuid():sub(9)
  for n = 1, size do
    items[n] = '{"wallet_uuid":"' .. wallet() .. '","operation_uuid":"' .. format("%08x", random(0, 0xffffffff)) .. rest
      .. '","operation_type":"DEPOSIT","amount":1}'
  end
  return post("/api/v1/operations", '{"operations":[' .. concat(items, ",") .. "]}")
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(format('{"requests":%d,"seconds":%.3f,"p50_ms":%.3f,"p99_ms":%.3f,"not_2xx":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
