"""The server: under load (`load`), under malformed requests (`malformed`), and compared with fal (`compare_fal`)."""
