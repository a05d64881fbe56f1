"""Keys and claims of a home, and the broker that enforces them. The kernel and the launcher share it; nobody else has the keys."""
