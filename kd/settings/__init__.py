"""What users set: dataclasses of recipe keys with defaults, help texts and validation."""
