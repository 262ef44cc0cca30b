"""A wallet service: a thin web layer over the PostgreSQL functions in db/.

`web` is what goes over HTTP, `calls` what is called in db/, `server` the processes around both. Begin with
web/application.py and web/handlers.py; calls/__init__.py has the words of `calls` and an order to read it in.
"""
