"""How the server holds up: load, malformed requests, and the comparison with fal."""
