"""The server: under load (`load`), malformed requests (`malformed`), hostile images (`image_costs`), and against fal's
(`compare_fal`)."""
