"""Teachers: live models, caches of a teacher's outputs, and the scoring that fills a cache."""
