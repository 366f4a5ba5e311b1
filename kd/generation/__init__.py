"""Sample answers from a teacher, filter them, and write training rows."""
