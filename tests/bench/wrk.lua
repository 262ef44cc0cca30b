-- Requests for wrk. Arguments after `--`: the share of balance reads in percent (100: reads only), then the number of wallets.
-- Wallet n is called w0001, w0002 ...; every operation has a random UUID of its own. Prints one line of JSON at the end.

local reads, wallets
local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(arguments)
  reads, wallets = tonumber(arguments[1]), tonumber(arguments[2])
  math.randomseed(os.time() * 1000 + number * 7919)
  for _ = 1, 10 do math.random() end
end

local random, format = math.random, string.format

function request()
  local wallet = format("w%05d", wallets == 1 and 1 or random(1, wallets))
  if reads > 0 and random(1, 100) <= reads then
    return "GET /api/v1/wallets/" .. wallet .. " HTTP/1.1\r\nHost: bench\r\n\r\n"
  end
  local uuid = format("%08x-%04x-4%03x-8%03x-%06x%06x", random(0, 0xffffffff), random(0, 0xffff), random(0, 0xfff),
    random(0, 0xfff), random(0, 0xffffff), random(0, 0xffffff))
  return "POST /api/v1/wallets/" .. wallet .. "/operation HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
    .. 'Content-Length: 95\r\n\r\n{"operation_uuid":"' .. uuid .. '","operation_type":"DEPOSIT","amount":1}'
end

function done(summary, latency, _)
  local errors = summary.errors
  io.write(format('{"requests":%d,"seconds":%.3f,"p50_ms":%.3f,"p99_ms":%.3f,"not_2xx":%d,"broken":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
