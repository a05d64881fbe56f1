"""One machine: reports its resources, starts and stops instances in their runtimes."""
