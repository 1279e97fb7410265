"""The server: under load (`load`), under malformed requests (`malformed`), under
hostile images (`image_costs`), and compared with fal (`compare_fal`)."""
