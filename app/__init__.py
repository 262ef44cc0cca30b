"""A wallet service: a thin web layer over the PostgreSQL functions in db/."""
