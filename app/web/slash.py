"""A path with a slash at its end: the old service led clients to the one without it."""

from aiohttp import web


async def redirection(request: web.Request) -> web.Response | None:
    """Return the 308 for a request whose path is that of a route but for a slash at its end; the query goes along.

    Where it leads begins with one slash: with two it would name another host (RFC 3986, section 4.2).
    """
    path, query = request.rel_url.raw_path.removesuffix("/"), request.rel_url.raw_query_string
    if path == request.rel_url.raw_path or not path or path.startswith("//"):
        return None
    known = await request.app.router.resolve(request.clone(rel_url=request.rel_url.with_path(path, encoded=True)))
    if known.http_exception is not None and known.http_exception.status != 405:
        return None
    return web.Response(status=308, headers={"Location": f"{path}?{query}" if query else path})
