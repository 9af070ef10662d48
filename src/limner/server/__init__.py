"""The HTTP service: two dialects of wire schemas over the engine, durable jobs, access, a page to work in."""
