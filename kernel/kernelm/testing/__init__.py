"""The testing kit: a real broker, a real kernel and real processes for tests of kernels, plugins and services."""
