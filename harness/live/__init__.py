"""A world model played live in a browser: server, protocol, page."""
