"""A bundle on disk: read it, choose its best engine here, load and serve it."""
