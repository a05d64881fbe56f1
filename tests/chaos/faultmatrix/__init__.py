"""The fault matrix: a real system, load on it, a fault, and the verdict on every call, event and job (see ../README.md)."""
