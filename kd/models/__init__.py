"""Models: loading, sharding and quantized formats; the student, its layers and its adapters."""
