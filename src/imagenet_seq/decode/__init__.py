"""The decode stage: encoded images become pixels, in the core and in Python."""
